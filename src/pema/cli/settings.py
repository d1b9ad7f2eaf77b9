"""Options of the command line, derived from the declarations of the settings."""

from __future__ import annotations

import functools
import inspect
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any

import typer

from pema.errors import AdapterError, ConfigError
from pema.schema import Field, among, fields_of, parse, require, short

SET = "set_"


@dataclass(frozen=True)
class Options:
    """The settings of one stage on the command line.

    Attributes:
        kind: the dataclass that declares them.
        common: fields that are options of their own.
        flags: options whose name is not the field's.
        rest: whether the other fields are reached by `--set key=value`.
        further: help text about settings of another library that `--set` accepts too; empty if there are none.
        defaults: whether the fields' own defaults apply, and are in the help text.
    """

    kind: type
    common: tuple[str, ...]
    flags: Mapping[str, str] = field(default_factory=dict)
    rest: bool = False
    further: str = ""
    defaults: bool = True

    def fields(self) -> dict[str, Field]:
        """Return all fields by name."""
        return {each.name: each for each in fields_of(self.kind)}

    def flag(self, name: str) -> str:
        """Return the option of a field."""
        return self.flags.get(name, f"--{name.replace('_', '-')}")

    def argument(self, name: str) -> str:
        """Return the name of the verb's argument for a field; several stages may have the field."""
        return f"{self.kind.__name__.lower()}_{name}"

    def parameter(self, name: str) -> inspect.Parameter:
        """Return the option of a field for typer; its value is a text or None, which `read` parses."""
        each, flag = self.fields()[name], self.flag(name)
        text = each.meaning() if self.defaults else each.help + (f" ({each.range()})" if each.range() else "")
        if each.hint is bool:
            option = typer.Option(f"{flag}/--no-{flag[2:]}", help=text, show_default=False)
            return _parameter(self.argument(name), Annotated[bool | None, option], None)
        if each.form() == "LIST":
            text += " May be repeated; \\n stands for a line break, and '' alone for an empty list."
            option = typer.Option(flag, help=text, metavar="TEXT", show_default=False)
            return _parameter(self.argument(name), Annotated[list[str] | None, option], None)
        option = typer.Option(flag, help=text, metavar=each.form(), show_default=False)
        return _parameter(self.argument(name), Annotated[str | None, option], None)

    def parameters(self) -> list[inspect.Parameter]:
        """Return all options."""
        parameters = [self.parameter(name) for name in self.common]
        if self.rest:
            others = [name for name in self.fields() if name not in self.common]
            more = f"; {self.further}" if self.further else ""
            text = f"Another setting; may be repeated: {', '.join(others)}{more}"
            option = typer.Option("--set", help=f"{text} (docs/settings.md).", metavar="KEY=VALUE", show_default=False)
            parameters.append(_parameter(SET, Annotated[list[str] | None, option], None))
        return parameters

    def read(self, given: dict[str, Any]) -> dict[str, Any]:
        """Take the values of these options out of what the user gave, each held to its limits.

        Raises:
            ConfigError: a value that is not one, or a setting that does not exist or is given twice.
        """
        values = {}
        for name in self.common:
            typed, each = given.pop(self.argument(name)), self.fields()[name]
            if isinstance(typed, str):
                values[name] = parse(self.flag(name), typed, each.hint, **each.limits)
            elif isinstance(typed, list):
                items = [] if typed == [""] else [with_line_breaks(item) for item in typed]
                values[name] = require(self.flag(name), items, each.hint, **each.limits)
            elif typed is not None:
                values[name] = typed
        for pair in (given.pop(SET) or []) if self.rest else []:
            key, equals, text = pair.partition("=")
            if not equals:
                raise ConfigError(f"--set {short(pair)} is not of the form key=value.")
            if key in values:
                raise ConfigError(f"{key} is given twice: omit one.")
            values[key] = self._other(key, text)
        return values

    def spell(self, name: str, value: str) -> str | None:
        """Return how a user types a setting: `--kappa 0.2` or `--set activation=gelu`; None if there is no way."""
        if name in self.common:
            flag = self.flag(name)
            if self.fields()[name].hint is bool:
                return flag if value == "true" else f"--no-{flag[2:]}"
            return f"{flag} {value}"
        return f"--set {name}={value}" if self.rest and name in self.fields() else None

    def _other(self, key: str, text: str) -> Any:  # noqa: ANN401
        known = self.fields()
        if key in known:
            return parse(key, text, known[key].hint, **known[key].limits)
        if not self.further:
            among("setting", [key], known, self.kind.__name__)
        try:
            return json.loads(text)
        except ValueError:
            return text


def with_line_breaks(text: str) -> str:
    r"""Turn `\n`, typed as two characters, into a line break; `\\n` remains a backslash and an n."""
    return re.sub(r"\\?\\n", lambda match: "\n" if len(match[0]) == 2 else r"\n", text)


def declared(**groups: Options) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Replace parameters of a verb by the options of some settings.

    The verb receives what was given as a dictionary, checked before its body runs.
    """

    def decorate(verb: Callable[..., None]) -> Callable[..., None]:
        signature = inspect.signature(verb, eval_str=True)
        parameters: list[inspect.Parameter] = []
        for each in signature.parameters.values():
            parameters += groups[each.name].parameters() if each.name in groups else [each.replace(kind=_KIND)]

        def spell(name: str, value: str) -> str | None:
            return next((text for group in groups.values() if (text := group.spell(name, value))), None)

        @functools.wraps(verb)
        def wrapper(**given: Any) -> None:  # noqa: ANN401
            settings = {name: group.read(given) for name, group in groups.items()}
            try:
                verb(**given, **settings)
            except (ConfigError, AdapterError) as error:
                # The same settings contradict each other in Python; a user of the command line types options.
                error.args = (respell(str(error), spell),)
                raise

        wrapper.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
        wrapper.__annotations__ = {each.name: each.annotation for each in parameters}
        return wrapper

    return decorate


_KIND = inspect.Parameter.KEYWORD_ONLY


def _parameter(name: str, annotation: Any, default: Any) -> inspect.Parameter:  # noqa: ANN401
    return inspect.Parameter(name, _KIND, default=default, annotation=annotation)


def respell(message: str, spell: Callable[[str, str], str | None]) -> str:
    """Rewrite the settings that a message names as `name=value` in the words of its reader.

    Args:
        message: the message, in the words of Python.
        spell: returns another form of a name and a value (without quotes; true, false and none in small letters), or
            None if the name is not one of its settings.
    """

    def write(match: re.Match[str]) -> str:
        name, value = match.groups()
        value = value.lower() if value in ("True", "False", "None") else value.strip("'")
        return spell(name, value) or match[0]

    return _SETTING.sub(write, message)


_SETTING = re.compile(r"(?<![\w.-])([a-z]\w*)=('[^']*'|[\w.+-]*\w)")
