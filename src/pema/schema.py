"""Records whose fields have types and limits: one check for what a caller sets and for what a file says."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import inspect
import math
import operator
import re
import types
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar, Union, get_args, get_origin, get_type_hints

from pema.errors import ConfigError

Record = TypeVar("Record")

WHOLE = (1 << 63) - 1
"""Default maximum of integers: the largest signed 64-bit number."""

SEED = (1 << 32) - 1
"""Largest seed."""

LONGEST = 1 << 20
"""Default maximum number of characters of a text, or items of a list."""

DEEPEST = 32
"""Maximum levels of nesting in a field of free values."""

MANY = 12
"""Number of choices that a message lists although one of them is similar to the unknown value."""

HUGE = 1e6
"""Limits from here on only exclude absurd values, and are omitted in help texts."""

NOT_EMPTY = "(?s).+"
"""Pattern of a text that is not empty."""

_FORMS = {int: "INTEGER", float: "NUMBER", bool: "true|false", Path: "PATH"}

_NAMES = {int: "a whole number", float: "a number", bool: "true or false", str: "a text", dict: "an object"}


def option(default: Any = dataclasses.MISSING, help: str = "", **limits: Any) -> Any:  # noqa: ANN401
    """Declare a dataclass field with its meaning and limits.

    Args:
        default: its default; without one the field is required.
        help: its meaning.
        limits: for numbers (and for each item of a list of numbers) `least`, `above` (exclusive), `most`, `below`
            (exclusive); for texts `line` (True: one printable line that is not empty) and `pattern`; for texts and
            lists `longest`.
    """
    return dataclasses.field(default=default, metadata={"help": help} | limits)


def same(kind: type, name: str) -> Any:  # noqa: ANN401
    """Declare a field with the default, meaning and limits of the same field in another dataclass."""
    field = next(each for each in fields_of(kind) if each.name == name)
    return dataclasses.field(default=field.default, metadata=field.limits)


def documented(kind: type[Record]) -> type[Record]:
    """Add the meaning of every field to the docstring of a dataclass."""
    lines = [f"    {f.name}: {f.meaning()}" for f in fields_of(kind)]  # type: ignore[arg-type]
    kind.__doc__ = f"{inspect.cleandoc(kind.__doc__ or '')}\n\nAttributes:\n" + "\n".join(lines) + "\n"
    return kind


class Field(NamedTuple):
    """A field of a dataclass; `default` is `dataclasses.MISSING` if it is required."""

    name: str
    hint: Any
    limits: Mapping[str, Any]
    default: Any

    @property
    def required(self) -> bool:
        """Whether the field is required."""
        return self.default is dataclasses.MISSING

    @property
    def help(self) -> str:
        """Meaning of the field."""
        return str(self.limits.get("help", ""))

    def has_default(self) -> bool:
        """Return whether the field has a default worth showing: not None, not empty and not a nested table."""
        nothing = self.required or self.default is None or dataclasses.is_dataclass(self.default)
        return not nothing and self.default not in ((), {})

    def meaning(self) -> str:
        """Return meaning, limits and default in one line."""
        notes = [self.range()] if self.range() else []
        if self.has_default():
            notes.append(f"default {_plain(self.default)}")
        return self.help + (f" ({'; '.join(notes)})" if notes else "")

    def range(self, huge: float = HUGE) -> str:
        """Return the limits in words; "" if there is none below `huge`."""
        low = self.limits.get("least", self.limits.get("above"))
        high = self.limits.get("most", self.limits.get("below"))
        high = None if high is None or high >= huge else f"{'below ' if 'below' in self.limits else ''}{_plain(high)}"
        low = None if low is None else f"{'above ' if 'above' in self.limits else ''}{_plain(low)}"
        if low is not None and high is not None:
            return f"{low} to {high}"
        return f"at least {low}".replace("at least above", "above") if low is not None else ""

    def form(self) -> str:
        """Return the form of a value for help texts: its choices, or its type."""
        optional = get_origin(self.hint) in (Union, types.UnionType)
        hint = next(each for each in (get_args(self.hint) if optional else [self.hint]) if each is not type(None))
        origin = get_origin(hint)
        if origin is Literal:
            return "|".join(get_args(hint))
        if origin is tuple:
            return "TABLES" if dataclasses.is_dataclass(get_args(hint)[0]) else "LIST"
        if dataclasses.is_dataclass(hint) or origin in (dict, Mapping):
            return "TABLE"
        return _FORMS.get(hint, "TEXT")


def check(record: Any) -> None:  # noqa: ANN401
    """Refuse a dataclass in which a value has the wrong type, is outside its limits or not among its choices.

    Integers in float fields become floats, lists become tuples. Every number must be finite.

    Raises:
        ConfigError: a value is invalid; the message names the field and the value.
    """
    for name, hint, limits, _ in fields_of(type(record)):  # type: ignore[arg-type]
        value = getattr(record, name)
        checked = _value(name, value, hint, limits)
        if checked is not value:
            object.__setattr__(record, name, checked)


def from_json(kind: type[Record], values: object, where: str = "") -> Record:
    """Build a dataclass, and the dataclasses nested in it, from a JSON object.

    Args:
        kind: the dataclass.
        values: its fields: all required ones, and no unknown ones.
        where: location of the object in its file, for the message.

    Raises:
        ConfigError: a field is missing, unknown or invalid; the message names it and its value.
    """
    what = where or "it"
    if not isinstance(values, Mapping):
        raise ConfigError(f"{what} is {short(values)}, not an object.")
    known(kind, values, where)
    given = {}
    for field in fields_of(kind):  # type: ignore[arg-type]
        name = field.name
        place = f"{where}.{name}" if where else name
        if name in values:
            given[name] = _value(place, values[name], field.hint, field.limits, nested=True)
        elif field.required:
            raise ConfigError(f"{place!r} is missing.")
    return kind(**given)


def require(name: str, value: Any, hint: Any, **limits: Any) -> Any:  # noqa: ANN401
    """Check one value against a type and limits; see `option`.

    Returns:
        The value, as `check` would store it.

    Raises:
        ConfigError: the value is invalid; the message names it.
    """
    return _value(name, value, hint, limits)


def require_instance(name: str, value: object, kind: type, remedy: str) -> None:
    """Check the type of an argument that a setting's type and limits cannot describe.

    Args:
        name: name of the argument.
        value: what was given.
        kind: the type.
        remedy: how to get one.

    Raises:
        ConfigError: it is something else; the message names it and the remedy.
    """
    if not isinstance(value, kind):
        raise ConfigError(f"{name}={short(value)} must be of type {kind.__name__}: {remedy}.")


def require_texts(name: str, values: object) -> None:
    """Refuse one text in the place of several: it would be read as one text per character.

    Raises:
        ConfigError: it is a text.
    """
    if isinstance(values, str):
        raise ConfigError(f"{name} must be a list of texts, not the text {short(values)}.")


def parse(name: str, text: str, hint: Any, **limits: Any) -> Any:  # noqa: ANN401
    """Parse a value typed by a user, and check it against a type and limits; see `option`.

    Args:
        name: name of the value, for the message.
        text: the input; `none` means None if the type allows it.
        hint: the type.
        limits: see `option`.

    Raises:
        ConfigError: the text is not a value of this type, or it is outside the limits.
    """
    inner = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    if type(None) in inner and text.lower() == "none":
        return None
    value: Any = text
    try:
        if int in inner or float in inner:
            value = int(text) if int in inner else float(text)
    except ValueError:
        pass  # `require` raises with the expected type
    if bool in inner and text.lower() in ("true", "false"):
        value = text.lower() == "true"
    return require(name, value, hint, **limits)


def known(kind: type, values: Mapping[str, Any], where: str = "") -> None:
    """Refuse a key that is not a field of a dataclass; messages name the class by `kind.called` if it exists.

    Raises:
        ConfigError: a key is unknown; the message names it and the most similar field.
    """
    among("setting", values, [f.name for f in dataclasses.fields(kind)], getattr(kind, "called", kind.__name__), where)


def among(what: str, values: Iterable[Any], names: Iterable[str], of: str = "", where: str = "") -> None:
    """Refuse a value that is not one of `names`; see `unknown`.

    Raises:
        ConfigError: a value is unknown; the message names it, the choices and the most similar one.
    """
    names = list(names)
    for value in values:
        if not isinstance(value, str) or value not in names:
            raise ConfigError(unknown(what, value, names, of, where))


def unknown(what: str, value: Any, names: Iterable[str], of: str = "", where: str = "") -> str:  # noqa: ANN401
    """Return the message about a value that is not one of `names`.

    Args:
        what: kind of value: "task", "setting", ...
        value: the value.
        names: the choices; a long list is shown only if no choice is similar to the value.
        of: owner of the choices.
        where: location of the value in its file.
    """
    names = list(names)
    near = difflib.get_close_matches(value, names, n=1) if isinstance(value, str) else []
    place = f"{where}.{value}" if where else value
    start = f"unknown {what} {short(place)}" + (f" of {of}" if of else "")
    if not names:
        return f"{start}: it has none."
    if near and len(names) > MANY:
        return f"{start}: did you mean {near[0]!r}?"
    choices = f"{', '.join(names[:-1])} or {names[-1]}" if len(names) > 1 else names[0]
    return f"{start}: use {choices}" + (f" (did you mean {near[0]!r}?)." if near else ".")


@functools.cache
def fields_of(kind: Any) -> tuple[Field, ...]:  # noqa: ANN401
    """Return the fields of a dataclass, with their types and limits."""
    hints = get_type_hints(kind)
    return tuple(
        Field(
            f.name,
            hints[f.name],
            f.metadata,
            f.default if f.default_factory is dataclasses.MISSING else f.default_factory(),
        )
        for f in dataclasses.fields(kind)
    )


def _value(name: str, value: Any, hint: Any, limits: Mapping[str, Any], nested: bool = False) -> Any:  # noqa: ANN401
    origin = get_origin(hint)
    if origin in (Union, types.UnionType):
        inner = [each for each in get_args(hint) if each is not type(None)]
        if value is None and len(inner) < len(get_args(hint)):
            return None
        if str in inner and len(inner) > 1:  # str, or another type
            inner = [str] if isinstance(value, str) else [each for each in inner if each is not str]
        (hint,) = inner
        origin = get_origin(hint)
    if origin is Literal:
        if not isinstance(value, str) or value not in get_args(hint):
            raise ConfigError(unknown(name, value, get_args(hint)))
        return value
    if origin in (tuple, Sequence):
        return _items(name, value, get_args(hint)[0], limits, nested)
    if hint is float and type(value) is int and abs(value) <= WHOLE:
        value = float(value)
    if hint in (int, float, bool, str) and type(value) is not hint:
        raise ConfigError(f"{name}={short(value)} must be {_NAMES[hint]}.")
    if hint in (int, float):
        _number(name, value, limits)
    elif hint is str:
        _text(name, value, limits)
    elif hint is Path:
        if isinstance(value, str):
            _text(name, value, limits)
            value = Path(value)
        if not isinstance(value, Path):
            raise ConfigError(f"{name}={short(value)} must be a path.")
    elif origin in (dict, Mapping) or hint in (dict, Mapping):
        if not isinstance(value, Mapping):
            raise ConfigError(f"{name}={short(value)} must be {_NAMES[dict]}.")
        kinds = get_args(hint)
        if kinds and dataclasses.is_dataclass(kinds[1]):
            items = {key: _value(f"{name}.{key}", item, kinds[1], {}, nested) for key, item in value.items()}
            return value if all(map(operator.is_, value.values(), items.values())) else items
        _shallow(name, value)
    elif dataclasses.is_dataclass(hint) and not isinstance(value, hint):  # type: ignore[arg-type]
        if not nested:
            raise ConfigError(f"{name}={short(value)} must be a {hint.__name__}.")  # type: ignore[union-attr]
        reader = getattr(hint, "from_dict", None)  # for types whose JSON form selects one of several classes
        return from_json(hint, value, name) if reader is None else reader(value)  # type: ignore[arg-type]
    return value


def _items(name: str, value: Any, hint: Any, limits: Mapping[str, Any], nested: bool) -> tuple[Any, ...]:  # noqa: ANN401
    if not isinstance(value, list | tuple):
        raise ConfigError(f"{name}={short(value)} must be a list.")
    if len(value) > limits.get("longest", LONGEST):
        raise ConfigError(f"{name} has {len(value):,} items, at most {limits.get('longest', LONGEST):,} are allowed.")
    each = {key: limit for key, limit in limits.items() if key != "longest"}
    items = tuple(_value(f"{name}[{i}]", item, hint, each, nested) for i, item in enumerate(value))
    return value if isinstance(value, tuple) and all(map(operator.is_, value, items)) else items


def _shallow(name: str, value: object) -> None:
    """Refuse free values that cannot be written as JSON: too deeply nested, or invalid Unicode."""
    level = [value]
    for _ in range(DEEPEST):
        inner: list[object] = []
        for each in level:
            if isinstance(each, Mapping):
                inner += [*each, *each.values()]
            elif isinstance(each, list | tuple):
                inner += each
            elif isinstance(each, str) and any("\ud800" <= char <= "\udfff" for char in each):
                raise ConfigError(f"{name} contains {short(each)}, which is not valid Unicode.")
        level = inner
    if level:
        raise ConfigError(f"{name} is nested more than {DEEPEST} levels deep.")


def _number(name: str, value: float, limits: Mapping[str, Any]) -> None:
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{name}={value} must be finite.")
    least = limits.get("least", limits.get("above", -WHOLE))
    most = limits.get("most", limits.get("below", WHOLE))
    if value < least:
        raise ConfigError(f"{name}={short(value)} is too small: it must be at least {least}.")
    if "above" in limits and value == least:
        raise ConfigError(f"{name}={short(value)} is too small: it must be more than {least}.")
    if value > most or ("below" in limits and value == most):
        raise ConfigError(
            f"{name}={short(value)} is too large: it must be {'less than' if 'below' in limits else 'at most'} {most}."
        )


def _text(name: str, value: str, limits: Mapping[str, Any]) -> None:
    longest = limits.get("longest", LONGEST)
    if len(value) > longest:
        raise ConfigError(f"{name}={short(value)} has {len(value):,} characters, at most {longest:,} are allowed.")
    if limits.get("line"):
        if not value or not value.isprintable():
            raise ConfigError(f"{name}={short(value)} must be one line of printable characters.")
    elif not all(
        char in "\t\n\r" or not (char < " " or "\x7f" <= char <= "\x9f" or "\ud800" <= char <= "\udfff")
        for char in value
    ):
        raise ConfigError(f"{name}={short(value)} contains control characters: remove them.")
    if limits.get("pattern") == NOT_EMPTY and not value:
        raise ConfigError(f"{name}='' is empty: give a text, or leave it out.")
    if "pattern" in limits and not re.fullmatch(limits["pattern"], value):
        raise ConfigError(f"{name}={short(value)} does not match the pattern {limits['pattern']}.")


def short(value: object) -> str:
    """Format a value for a message: shortened if long, without terminal control sequences."""
    if isinstance(value, int) and value.bit_length() > 200:
        return "a number of hundreds of digits"
    if isinstance(value, str):
        return repr(value if len(value) <= 80 else f"{value[:77]}...")
    if isinstance(value, dict | list | tuple | set):
        return f"{'an object' if isinstance(value, dict) else 'a list'} of {len(value):,} items"
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _plain(value: object) -> str:
    """Format a default as a user would type it."""
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)
