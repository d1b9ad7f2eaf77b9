"""Read results: every file is held to its record, and the files of a folder to one another."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any, TypeVar

from pema.errors import ConfigError, DataError
from pema.experiments.layout import COMET, COMPARISON, EXPERIMENT, TEST
from pema.experiments.records import Comparison, ExperimentFacts, Record, Results, Run, Score
from pema.files import read_json
from pema.schema import from_json, require
from pema.tasks.readers import read_examples, read_lines

Kind = TypeVar("Kind", bound=Record)
AGAIN = "It is damaged or of an older version: make the results again."


def read_results(folder: Path) -> list[Results]:
    """Read one experiment's folder, or every experiment of a folder, in the order of their names.

    Raises:
        DataError: there is no experiment, or a file is missing, damaged, of an older format or contradicts another;
            the message names the file, the field and the remedy.
    """
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder: give the folder that `pema compare` or `pema sweep` wrote.")
    folders = [folder]
    if not (folder / EXPERIMENT).exists():
        folders = sorted(path.parent for path in folder.glob(f"*/{EXPERIMENT}"))
    if not folders:
        raise DataError(
            f"{folder} holds no experiment: no {EXPERIMENT} lies in it or in a folder of it. Make results with "
            "`pema compare` or `pema sweep`."
        )
    return [_with_texts(each) for each in folders]


def read_folder(folder: Path) -> Results:
    """Read the numbers of one experiment's folder, without its texts.

    Raises:
        DataError: see `read_results`.
    """
    about = record(ExperimentFacts, read_json(folder / EXPERIMENT), str(folder / EXPERIMENT))
    comparison = record(Comparison, read_json(folder / COMPARISON), str(folder / COMPARISON))
    runs = []
    for path in sorted(folder.glob("*.json")):
        if path.name in (EXPERIMENT, COMPARISON):
            continue
        run = read_run(path, f"Remove it and {again(about, start='make')}")
        if run.run != path.stem:
            raise DataError(f"{path} holds the run {run.run!r}: name the file {run.run}.json, or remove it.")
        scores = folder / COMET / path.name
        runs.append(scored_elsewhere(run, read_json(scores) if scores.exists() else None, comparison, str(scores)))
    return assemble(about, comparison, runs, str(folder))


def read_run(path: Path, remedy: str = AGAIN) -> Run:
    """Read the result of one run.

    Raises:
        DataError: it is missing or damaged, or another version wrote it.
    """
    return record(Run, read_json(path), str(path), remedy)


def record(kind: type[Kind], values: object, where: str, remedy: str = AGAIN) -> Kind:
    """Hold the values of a file to their record.

    Args:
        kind: the record.
        values: what was read.
        where: the file, for the message.
        remedy: a sentence for the message.

    Raises:
        DataError: names the file, the field and its value.
    """
    try:
        return from_json(kind, values)
    except ConfigError as error:
        raise DataError(f"{where}: {error} {remedy}") from error


def scored_elsewhere(run: Run, scores: object, comparison: Comparison, where: str) -> Run:
    """Add the score that another environment gave a run, where the comparison holds its metric.

    Raises:
        DataError: the scores are damaged.
    """
    if scores is None:
        return run
    try:
        if not isinstance(scores, Mapping):
            raise ConfigError("it is not an object.")
        for name in ("metric", "signature", "segments"):
            if name not in scores:
                raise ConfigError(f"{name!r} is missing.")
        metric = require("metric", scores["metric"], str)
        segments = require("segments", scores["segments"], tuple[float, ...])
        if not segments:
            raise ConfigError("segments is empty.")
        score = Score(value=fmean(segments), signature=require("signature", scores["signature"], str))
    except ConfigError as error:
        raise DataError(f"{where}: {error} Score the outputs again.") from error
    if metric not in comparison.rows[0].metrics:
        return run
    return replace(run, scores={**run.scores, metric: score})


def assemble(about: ExperimentFacts, comparison: Comparison, runs: Iterable[Run], where: str) -> Results:
    """Hold the records of an experiment to one another.

    Raises:
        DataError: they contradict one another; `where` is named.
    """
    labels = [row.label for row in comparison.rows]
    if set(labels) != set(about.methods) or about.reference not in (*labels, None):
        raise DataError(
            f"{where}: {COMPARISON} has rows of {_names(labels)}, {EXPERIMENT} names {_names(about.methods)} and the "
            f"reference {about.reference!r}. {again(about)}"
        )
    grouped: dict[str, list[Run]] = {label: [] for label in about.methods}
    for run in runs:
        if run.label not in grouped:
            raise DataError(
                f"{where}: {run.run} is a run of {run.label!r}, which the experiment does not name: remove it."
            )
        grouped[run.label].append(run)
    results = Results(
        about, comparison, {label: tuple(sorted(some, key=lambda run: run.seed)) for label, some in grouped.items()}
    )
    for row in comparison.rows:
        found = results.runs[row.label]
        if not found:
            raise DataError(f"{where} holds no run of {row.label!r}. {again(about)}")
        if row.seeds != len(found):
            raise DataError(
                f"{where}: {COMPARISON} counts {row.seeds} seeds of {row.label!r}, but {len(found)} runs lie beside "
                f"it. {again(about)}"
            )
        for metric in results.metrics:
            if metric not in row.metrics:
                raise DataError(f"{where}: {COMPARISON} lacks {metric!r} of {row.label!r}. {again(about)}")
            for run in found:
                if metric not in run.scores:
                    raise DataError(f"{where}: the run {run.run} has no score {metric!r}. {again(about)}")
    return results


def again(about: ExperimentFacts, start: str = "Make") -> str:
    """What to do about results that cannot be used."""
    return f"{start} the results again with `pema {about.kind}`."


def _with_texts(folder: Path) -> Results:
    results = read_folder(folder)
    outputs = {}
    for run in (run for some in results.runs.values() for run in some):
        path = folder / f"{run.run}.txt"
        outputs[run.run] = read_lines(path)
        _require_count(path, len(outputs[run.run]), results.about)
    examples = None
    if (folder / TEST).exists():
        examples = read_examples(data=str(folder / TEST))
        _require_count(folder / TEST, len(examples), results.about)
    return replace(results, outputs=outputs, examples=examples)


def _require_count(path: Path, count: int, about: ExperimentFacts) -> None:
    if count != about.data.test:
        raise DataError(f"{path} holds {count} lines for {about.data.test} test examples. {again(about)}")


def _names(labels: Iterable[Any]) -> str:
    return ", ".join(repr(label) for label in labels)
