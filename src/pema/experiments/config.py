"""Reader of the TOML file that describes a comparison or a sweep: methods, data, budget and seeds."""

from __future__ import annotations

import itertools
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

from pema.console import note
from pema.errors import ConfigError, DataError
from pema.evaluation.classifier_name import ClassifierName
from pema.evaluation.evaluate import FORMALITY, LABEL_ACCURACY, get_metric
from pema.evaluation.notation import is_style
from pema.experiments.data import SHIPPED, Data
from pema.experiments.description import DataTable, ExperimentFile, GyafcFiles, MethodTable, TextFiles
from pema.experiments.experiment import Entry, Experiment, Kind
from pema.methods.registry import get_method, require_method
from pema.schema import from_json
from pema.tasks.example import Example, one_target_each
from pema.tasks.frames import HUB
from pema.tasks.gyafc import read_gyafc
from pema.tasks.labels import require_labels
from pema.tasks.readers import read, read_lines
from pema.tasks.registry import get_task

CLASSIFICATION = "classification"
"""The task whose labels are also chosen by likelihood if the file names no metrics."""


def read_config(path: Path, kind: Kind, data_root: Path | None = None) -> Experiment:
    """Read the description of a comparison or of a sweep, and choose its device; see `read_description`."""
    return on_device(read_description(path, kind, data_root))


def on_device(experiment: Experiment) -> Experiment:
    """Return the experiment with the device of this machine in place of `auto`.

    Raises:
        AdapterError: this machine has no such device.
    """
    from pema.devices import device_named  # loads torch, so errors in the file are reported before

    return replace(experiment, device=str(device_named(experiment.device)))


def read_description(path: Path, kind: Kind, data_root: Path | None = None) -> Experiment:
    """Read the description of a comparison or of a sweep (docs/experiments.md), without loading torch.

    Args:
        path: the TOML file.
        kind: `compare` or `sweep`, which decides the meaning of grids.
        data_root: folder that the data's paths are relative to; None: the file's own folder.

    Raises:
        ConfigError: a key is unknown or a value invalid; the message names both.
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
        return _experiment(from_json(ExperimentFile, table), path.stem, kind, data_root or path.parent)
    except ConfigError as error:
        raise ConfigError(f"{path.name}: {error}") from error


def _experiment(file: ExperimentFile, name: str, kind: Kind, root: Path) -> Experiment:
    name = name if file.name is None else file.name
    if not name or not all(letter.isalnum() or letter in "-_." for letter in name) or name.startswith("."):
        raise ConfigError(f"name {name!r} becomes a folder: use letters, digits, '-', '_' and '.' only.")
    task = get_task(file.task, file.template, chat=file.chat, system=file.system)
    for table in file.methods:
        require_method(table.method)  # before the data are read
    data = _data(file.data, task.name, root)
    metrics = file.metrics
    if metrics is None:
        metrics = (*task.metrics, *([FORMALITY] if "test" in data.annotated else []))
        metrics += (LABEL_ACCURACY,) if task.name == CLASSIFICATION else ()
    if LABEL_ACCURACY in metrics:
        _announce_labels(data)
    for metric in metrics:
        if is_style(metric):  # its classifier is only loaded when outputs are scored
            ClassifierName.of(metric)
        else:
            get_metric(metric, data.annotated.get("test"), sources=[example.source for example in data.test])
    if not metrics:
        raise ConfigError("metrics is empty: name at least one.")
    return Experiment(
        name=name,
        title=name if file.title is None else file.title,
        kind=kind,
        task=task,
        plm=file.plm,
        plm_dtype=file.plm_dtype,
        device=file.device,
        batch_tokens=file.batch_tokens,
        batch_size=file.batch_size,
        seeds=file.seeds,
        metrics=metrics,
        references=(file.reference,) if isinstance(file.reference, str) else tuple(file.reference),
        data=data,
        budget=file.budget,
        entries=tuple(map(_entry, file.methods)),
        choose_by=file.choose_by,
        choose_texts=file.choose_texts,
        decoding=file.decoding,
    )


def _entry(table: MethodTable) -> Entry:
    method = get_method(table.method)
    for key, candidates in (("grid", table.grid), ("choose", table.choose)):
        for name, values in candidates.items():
            if not isinstance(values, list) or not values:
                raise ConfigError(f"{table.label}: {key}.{name} must be a list of candidates, not {values!r}.")
    named = [("settings", table.settings), ("grid", table.grid), ("choose", table.choose)]
    for (one, first), (other, second) in itertools.combinations(named, 2):
        for name in sorted(first.keys() & second.keys()):
            raise ConfigError(f"{table.label}: {name!r} is given in {one} and in {other}: leave one out.")
    return Entry(table.label, method, table.settings, table.grid, table.choose, table.seeds)


def _data(table: DataTable, task: str, root: Path) -> Data:
    given = {part: getattr(table, part) for part in ("train", "dev", "test")}
    if table.name in SHIPPED and not any(given.values()):
        return SHIPPED[table.name]()
    examples: dict[str, tuple[Example, ...]] = {}
    annotated: dict[str, tuple[list[str], list[str]]] = {}
    for part, values in given.items():
        if values is None:
            raise ConfigError(f"'data.{part}' is missing.")
        if "gyafc" in values:
            gyafc = from_json(GyafcFiles, values, f"data.{part}")
            settings = {name: value for name, value in vars(gyafc).items() if name != "gyafc"}
            examples[part] = tuple(read_gyafc(root / gyafc.gyafc, **settings))
            continue
        files = from_json(TextFiles, values, f"data.{part}")
        if (files.formal is None) != (files.informal is None):
            raise ConfigError(f"data.{part}: give formal and informal, both or neither.")
        examples[part] = tuple(_examples(files, root))
        if files.formal is not None and files.informal is not None:
            annotated[part] = (read_lines(root / files.formal), read_lines(root / files.informal))
    train = tuple(one_target_each(examples["train"]))
    labels = None if table.labels is None else tuple(require_labels(table.labels))
    return Data(table.name, task, train, examples["dev"], examples["test"], annotated, labels)


def _announce_labels(data: Data) -> None:
    """Say which labels `label_accuracy` chooses from."""
    labels = frozenset(data.choices)
    other = sum(labels.isdisjoint(example.references) for example in data.test)
    note(
        f"{LABEL_ACCURACY} chooses from {len(labels):,} labels, "
        + ("the different targets of train" if data.labels is None else "those of data.labels")
        + (f"; {other:,} of {len(data.test):,} test examples have another label." if other else ".")
    )


def _examples(files: TextFiles, root: Path) -> list[Example]:
    """Read the examples of the files; paths are relative to `root`."""

    def path(text: str | None) -> Any:  # noqa: ANN401
        return text if text is None or text.startswith(HUB) else root / text

    reading = read(
        path(files.data),
        source=path(files.source),
        target=path(files.target),
        source_field=files.source_field,
        target_field=files.target_field,
        limit=files.limit,
    )
    note(str(reading))
    return reading.examples
