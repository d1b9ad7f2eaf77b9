"""Reader of results, which checks every file against its record and the files of a folder against each other."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any, TypeVar

from pema.console import note
from pema.errors import ConfigError, DataError
from pema.experiments.layout import COMET, COMPARISON, EXPERIMENT, TEST
from pema.experiments.records import Comparison, ExperimentFacts, Record, Results, Row, Run, Score
from pema.experiments.texts import read_texts, texts_file
from pema.files import read_json
from pema.schema import from_json, require
from pema.tasks.readers import read_examples

Kind = TypeVar("Kind", bound=Record)
AGAIN = "It is damaged or of an older version: produce the results again."


def read_results(folder: Path) -> list[Results]:
    """Read the folder of one experiment, or all experiments in a folder, sorted by name.

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
            f"{folder} contains no experiment: there is no {EXPERIMENT} in it or in its folders. Produce results with "
            "`pema compare` or `pema sweep`."
        )
    started = [each for each in folders if (each / COMPARISON).exists()]
    for each in folders:
        if started and each not in started:
            note(f"{each} is left out: none of its finished runs is compared yet.")
    return [_with_texts(each) for each in started or folders]


def read_folder(folder: Path) -> Results:
    """Read the numbers of one experiment's folder, without its texts.

    Raises:
        DataError: see `read_results`.
    """
    about = record(ExperimentFacts, read_json(folder / EXPERIMENT), str(folder / EXPERIMENT))
    if about.runs is not None and not (folder / COMPARISON).exists():
        raise DataError(f"{folder}: no run is compared yet: run `pema {about.kind}` again, which continues.")
    comparison = record(Comparison, read_json(folder / COMPARISON), str(folder / COMPARISON))
    runs = []
    for path in sorted(folder.glob("*.json")):
        if path.name in (EXPERIMENT, COMPARISON):
            continue
        run = read_run(path, f"Remove it and {again(about, start='produce')}")
        if run.run != path.stem:
            raise DataError(f"{path} contains the run {run.run!r}: name the file {run.run}.json, or remove it.")
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
    """Build a record from the values of a file, and check them.

    Args:
        kind: the record.
        values: values in the file.
        where: name of the file, for the message.
        remedy: remedy in the message, a sentence.

    Raises:
        DataError: a value is invalid; the message names the file, the field and its value.
    """
    try:
        return from_json(kind, values)
    except ConfigError as error:
        raise DataError(f"{where}: {error} {remedy}") from error


def scored_elsewhere(run: Run, scores: object, comparison: Comparison, where: str) -> Run:
    """Add a score computed in another environment to a run, if the comparison contains its metric.

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
    """Check the records of an experiment against each other, and combine them.

    The methods of an unfinished experiment, which lists its planned runs, are those with finished runs.

    Raises:
        DataError: they contradict each other; the message names `where`.
    """
    labels = [row.label for row in comparison.rows]
    partial = about.runs is not None and set(labels) < set(about.methods)
    if not (partial or set(labels) == set(about.methods)) or about.reference not in (*about.methods, None):
        raise DataError(
            f"{where}: {COMPARISON} has rows of {_names(labels)}, {EXPERIMENT} names {_names(about.methods)} and the "
            f"reference {about.reference!r}. {again(about)}"
        )
    planned = tuple(name for names in (about.runs or {}).values() for name in names)
    grouped: dict[str, list[Run]] = {label: [] for label in about.methods}
    for run in runs:
        if run.label not in grouped:
            raise DataError(f"{where}: {run.run} is a run of {run.label!r}, which is not in the experiment: remove it.")
        if planned and run.run not in planned:
            raise DataError(f"{where}: {run.run} is of seed {run.seed}, which {EXPERIMENT} does not name: remove it.")
        grouped[run.label].append(run)
    finished = {run.run for some in grouped.values() for run in some}
    compared = {name for names in comparison.signature.config.get("runs", {}).values() for name in names}
    uncompared = tuple(name for name in planned if compared and name in finished - compared)
    results = Results(
        replace(
            about,
            methods=tuple(label for label in about.methods if label in labels),
            reference=about.reference if about.reference in labels else None,
        ),
        comparison,
        {
            label: tuple(sorted((run for run in grouped[label] if run.run not in uncompared), key=lambda run: run.seed))
            for label in about.methods
            if label in labels
        },
        missing=tuple(name for name in planned if name not in finished),
        uncompared=uncompared,
    )
    for row in comparison.rows:
        _require_complete(results, row, where)
    return results


def _require_complete(results: Results, row: Row, where: str) -> None:
    """Refuse a row of the comparison whose runs or scores are missing."""
    about, runs = results.about, results.runs[row.label]
    if not runs:
        raise DataError(f"{where} contains no run of {row.label!r}. {again(about)}")
    if row.seeds != len(runs):
        raise DataError(
            f"{where}: {COMPARISON} counts {row.seeds} seeds of {row.label!r}, but there are {len(runs)} runs. "
            f"{again(about)}"
        )
    for metric in results.metrics:
        if metric not in row.metrics:
            raise DataError(f"{where}: {COMPARISON} lacks {metric!r} of {row.label!r}. {again(about)}")
        for run in runs:
            if metric not in run.scores:
                raise DataError(f"{where}: the run {run.run} has no score {metric!r}. {again(about)}")


def again(about: ExperimentFacts, start: str = "Produce") -> str:
    """Return the remedy for unusable results, for messages."""
    return f"{start} the results again with `pema {about.kind}`."


def _with_texts(folder: Path) -> Results:
    results = read_folder(folder)
    outputs = {}
    for run in (run for some in results.runs.values() for run in some):
        outputs[run.run] = read_texts(folder, run.run)
        _require_count(texts_file(folder, run.run), len(outputs[run.run]), results.about)
    examples = None
    if (folder / TEST).exists():
        examples = read_examples(data=str(folder / TEST))
        _require_count(folder / TEST, len(examples), results.about)
    return replace(results, outputs=outputs, examples=examples)


def _require_count(path: Path, count: int, about: ExperimentFacts) -> None:
    if count != about.data.test:
        raise DataError(f"{path} has {count} lines for {about.data.test} test examples. {again(about)}")


def _names(labels: Iterable[Any]) -> str:
    return ", ".join(repr(label) for label in labels)
