"""The file that a comparison or a sweep is described in (TOML): methods, data, budget and seeds."""

from __future__ import annotations

import itertools
import tomllib
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from pema.errors import ConfigError, DataError
from pema.evaluation.evaluate import FORMALITY, get_metric
from pema.evaluation.style import is_style
from pema.experiments.data import SUPPORT, Data, support_data
from pema.experiments.experiment import Entry, Experiment, Kind
from pema.methods.contract import Budget
from pema.methods.registry import get_method
from pema.schema import require
from pema.tasks.example import Example
from pema.tasks.gyafc import read_gyafc
from pema.tasks.readers import HUB, read_examples, read_lines
from pema.tasks.registry import get_task


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
    references = table.take("reference", (str, list), [])
    experiment = Experiment(
        name=name,
        title=table.take("title", str, name),
        kind=kind,
        task=task,
        plm=table.take("plm", str, "embedded"),
        plm_dtype=table.take("plm_dtype", str, None),
        seeds=tuple(table.take("seeds", list, [0])),
        metrics=metrics,
        references=(references,) if isinstance(references, str) else tuple(references),
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
    method = get_method(table.take("method", str))
    settings, grid, choose = (table.take(key, dict, {}) for key in ("settings", "grid", "choose"))
    table.end()
    for key, candidates in (("grid", grid), ("choose", choose)):
        for name, values in candidates.items():
            if not isinstance(values, list) or not values:
                raise ConfigError(f"{label}: {key}.{name} must be a list of candidates, not {values!r}.")
    named = [("settings", settings), ("grid", grid), ("choose", choose)]
    for (one, first), (other, second) in itertools.combinations(named, 2):
        for name in sorted(first.keys() & second.keys()):
            raise ConfigError(f"{label}: {name!r} is given in {one} and in {other}: leave one out.")
    return Entry(label, method, settings, grid, choose)


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
    limit = require(f"limit in {table.where}", table.take("limit", int, None), int | None, least=1)
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
