"""The file that a comparison or a sweep is described in (TOML): methods, data, budget and seeds."""

from __future__ import annotations

import itertools
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from pema.errors import ConfigError, DataError, PemaError
from pema.evaluation.evaluate import FORMALITY, get_metric
from pema.evaluation.style import is_style
from pema.experiments.data import SUPPORT, Data, support_data
from pema.memory.manifest import digest
from pema.methods.contract import Budget, Method
from pema.methods.registry import get_method
from pema.tasks.example import Example
from pema.tasks.gyafc import read_gyafc
from pema.tasks.readers import HUB, read_examples, read_lines
from pema.tasks.registry import Task, get_task

Kind = Literal["compare", "sweep"]
EXAMPLES = "examples"
PLM = "plm"
OF_THE_RUN = (EXAMPLES, PLM)
"""Settings that every method has: learn from so many of the training examples only; adapt another PLM."""


@dataclass(frozen=True)
class Entry:
    """A line of the table.

    Attributes:
        label: what the table calls it.
        method: the method's class.
        settings: that hold in all its runs.
        grid: settings with candidates: `compare` chooses among them on dev, `sweep` reports all.
    """

    label: str
    method: type[Method]
    settings: Mapping[str, Any]
    grid: Mapping[str, Sequence[Any]]

    def __post_init__(self) -> None:
        for candidate in self.candidates():
            try:
                made(self.method, candidate)
            except PemaError as error:
                raise ConfigError(f"{self.label}: {error}") from error
            except TypeError as error:
                raise ConfigError(f"{self.label}: a setting is of the wrong type: {error}.") from error

    def candidates(self) -> Iterator[dict[str, Any]]:
        """Every combination of the grid, with the other settings."""
        for values in itertools.product(*self.grid.values()):
            yield {**self.settings, **dict(zip(self.grid, values, strict=True))}


@dataclass(frozen=True)
class Experiment:
    """What `pema compare` and `pema sweep` are given.

    Attributes:
        name: folder of the results.
        title: what the report calls it.
        kind: `compare` or `sweep`.
        task: template and default metrics.
        plm: name or folder, as `LocalPLM.load` takes it.
        plm_dtype: precision to load it in; None is the library's own choice.
        seeds: every setting that is reported runs once with each.
        metrics: names; the first one leads.
        reference: label of the entry that the others are compared with; None: none is.
        data: the data.
        budget: of every method.
        entries: the table's lines, in order.
    """

    name: str
    title: str
    kind: Kind
    task: Task
    plm: str
    plm_dtype: str | None
    seeds: tuple[int, ...]
    metrics: tuple[str, ...]
    reference: str | None
    data: Data
    budget: Budget
    entries: tuple[Entry, ...]

    def __post_init__(self) -> None:
        labels = [entry.label for entry in self.entries]
        if not labels:
            raise ConfigError("there is nothing to run: give at least one [[methods]].")
        twice = {label for label in labels if labels.count(label) > 1}
        if twice:
            raise ConfigError(f"two methods are labelled {sorted(twice)[0]!r}: give each a label of its own.")
        if self.reference is not None and self.reference not in labels:
            raise ConfigError(f"reference {self.reference!r} is no label: choose one of {', '.join(labels)}.")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ConfigError(f"seeds {list(self.seeds)} must be one or more different numbers.")
        for entry in self.entries:
            trainings = {digest(dict(made(entry.method, each).trained_by)) for each in entry.candidates()}
            if self.kind == "compare" and len(trainings) > self.budget.trials:
                raise ConfigError(
                    f"{entry.label}: {len(trainings)} trainings are more than the budget's trials="
                    f"{self.budget.trials}: shorten the grid, or give all methods more trials."
                )


def made(method: type[Method], settings: Mapping[str, Any]) -> Method:
    """The method with its own settings; those of the run are left out."""
    return method.of({name: value for name, value in settings.items() if name not in OF_THE_RUN})


def read_config(path: Path, kind: Kind, data_root: Path | None = None) -> Experiment:
    """Read the description of a comparison or of a sweep (docs/experiments.md).

    Args:
        path: the TOML file.
        kind: what the grids mean.
        data_root: the folder that paths of data start from; None is the file's own folder.

    Raises:
        ConfigError: an unknown key, or a value that cannot be meant; the message names both.
        DataError: the file or its data cannot be read.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read: {error}.") from error
    try:
        table = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path} is not TOML: {error}.") from error
    try:
        return _experiment(_Table(table, "the file"), path.stem, kind, data_root or path.parent)
    except ConfigError as error:
        raise ConfigError(f"{path.name}: {error}") from error


class _Table:
    """A TOML table whose keys are taken one by one, so that what is left over is known to mean nothing."""

    def __init__(self, values: Mapping[str, Any], where: str) -> None:
        self.values, self.where = dict(values), where

    def take(self, key: str, kind: type | tuple[type, ...], default: Any = ...) -> Any:  # noqa: ANN401
        if key not in self.values:
            if default is ...:
                raise ConfigError(f"{key!r} is missing in {self.where}.")
            return default
        value = self.values.pop(key)
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            wanted = " or ".join(each.__name__ for each in (kind if isinstance(kind, tuple) else (kind,)))
            raise ConfigError(f"{key} in {self.where} must be of type {wanted}, not {value!r}.")
        return value

    def table(self, key: str) -> _Table:
        return _Table(self.take(key, dict, {}), f"[{key}]")

    def end(self) -> None:
        if self.values:
            raise ConfigError(f"{sorted(self.values)[0]!r} in {self.where} means nothing: remove it, or mend its name.")


def _experiment(table: _Table, name: str, kind: Kind, root: Path) -> Experiment:
    name = table.take("name", str, name)
    if not name or not all(letter.isalnum() or letter in "-_." for letter in name) or name.startswith("."):
        raise ConfigError(f"name {name!r} becomes a folder: use letters, digits, '-', '_' and '.' only.")
    task = get_task(table.take("task", str, "translation"), table.take("template", str, None))
    data = _data(table.table("data"), task.name, root)
    metrics = tuple(table.take("metrics", list, [*task.metrics, *([FORMALITY] if "test" in data.annotated else [])]))
    for metric in metrics:
        if not is_style(str(metric)):  # its classifier is loaded when there is something to classify
            get_metric(str(metric), data.annotated.get("test"))
    if not metrics:
        raise ConfigError("metrics is empty: name at least one.")
    experiment = Experiment(
        name=name,
        title=table.take("title", str, name),
        kind=kind,
        task=task,
        plm=table.take("plm", str, "embedded"),
        plm_dtype=table.take("plm_dtype", str, None),
        seeds=tuple(table.take("seeds", list, [0])),
        metrics=metrics,
        reference=table.take("reference", str, None),
        data=data,
        budget=_budget(table.table("budget")),
        entries=tuple(_entry(_Table(each, "[[methods]]")) for each in table.take("methods", list, [])),
    )
    table.end()
    return experiment


def _budget(table: _Table) -> Budget:
    kinds: dict[str, type | tuple[type, ...]] = {"dev_fraction": (int, float)}
    given = {
        each.name: table.take(each.name, kinds.get(each.name, int))
        for each in fields(Budget)
        if each.name in table.values
    }
    table.end()
    return Budget(**given)


def _entry(table: _Table) -> Entry:
    label = table.take("label", str)
    table.where = f"[[methods]] {label!r}"
    grid = table.take("grid", dict, {})
    for name, values in grid.items():
        if not isinstance(values, list) or not values:
            raise ConfigError(f"{label}: grid.{name} must be a list of candidates, not {values!r}.")
    method = get_method(table.take("method", str))
    entry = Entry(label, method, table.take("settings", dict, {}), grid)
    table.end()
    both = entry.settings.keys() & entry.grid.keys()
    if both:
        raise ConfigError(f"{label}: {sorted(both)[0]!r} is given in settings and in grid: leave one out.")
    return entry


def _data(table: _Table, task: str, root: Path) -> Data:
    name = table.take("name", str)
    if name == SUPPORT and not table.values:
        return support_data()
    parts, annotated = {}, {}
    for part in ("train", "dev", "test"):
        given = _Table(table.take(part, dict), f"[data] {part}")
        formal, informal = (given.take(key, str, None) for key in ("formal", "informal"))
        if (formal is None) != (informal is None):
            raise ConfigError(f"[data] {part}: give formal and informal, both or neither.")
        parts[part] = tuple(_examples(given, root))
        if formal is not None:
            annotated[part] = (read_lines(root / formal), read_lines(root / informal))
    table.end()
    return Data(name, task, parts["train"], parts["dev"], parts["test"], annotated)


def _examples(table: _Table, root: Path) -> list[Example]:
    """The examples that the keyword arguments of `read_examples` or `read_gyafc` name; paths start from `root`."""
    limit = table.take("limit", int, None)
    gyafc = table.take("gyafc", str, None)
    if gyafc is not None:
        part, domain = table.take("part", str), table.take("domain", str, None)
        reference = table.take("reference", int, 0)
        table.end()
        return read_gyafc(root / gyafc, part=part, domain=domain, reference=reference, limit=limit)
    paths: dict[str, Any] = {key: table.take(key, str, None) for key in ("data", "source", "target")}
    names = {key: table.take(key, str, key.partition("_")[0]) for key in ("source_field", "target_field")}
    table.end()
    for key, value in paths.items():
        if value is not None and not value.startswith(HUB):
            paths[key] = root / value
    return read_examples(**paths, **names, limit=limit)
