"""The result folders that a report is made from, read and held to their format."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from pema.errors import DataError
from pema.experiments.fields import (
    FIELDS_OF_DIFFERENCE,
    FIELDS_OF_EXPERIMENT,
    FIELDS_OF_INTERVAL,
    FIELDS_OF_POINT,
    FIELDS_OF_RUN,
    LIST,
    NUMBER,
    NUMBER_OR_NULL,
    OBJECT,
    TEXT,
    require,
    short,
)
from pema.experiments.layout import COMET, COMPARISON, EXPERIMENT, TEST
from pema.files import read_json
from pema.tasks.example import Example
from pema.tasks.readers import read_examples, read_lines

WEIGHTS = ("none", "some", "all")


Differences = dict[tuple[str, str], dict[str, Any]]


@dataclass(frozen=True)
class Experiment:
    """One comparison or sweep.

    Attributes:
        folder: where its results lie.
        about: `experiment.json`.
        metrics: names, the leading one first; after those of `experiment.json` those that `comparison.json` adds to it.
        rows: of `comparison.json`, by label.
        differences: of `comparison.json`, by what the others are compared with, and then by label and metric.
        runs: every run's result by label, in the order of the methods and then of the seeds.
        outputs: hypotheses of the test examples, by run.
        examples: the test examples, or None where the results do not hold them.
    """

    folder: Path
    about: dict[str, Any]
    metrics: tuple[str, ...]
    rows: dict[str, dict[str, Any]]
    differences: dict[str, Differences]
    runs: dict[str, list[dict[str, Any]]]
    outputs: dict[str, list[str]]
    examples: list[Example] | None


def read_results(results: Path) -> list[Experiment]:
    """Read one experiment's folder, or every experiment of a folder, in the order of their names.

    Raises:
        DataError: there is no experiment, or a file is missing, damaged, of an older format or contradicts another;
            the message names the file, the field and the remedy.
    """
    if not results.is_dir():
        raise DataError(f"{results} is not a folder: give the folder that `pema compare` or `pema sweep` wrote.")
    folders = [results]
    if not (results / EXPERIMENT).exists():
        folders = sorted(path.parent for path in results.glob(f"*/{EXPERIMENT}"))
    if not folders:
        raise DataError(
            f"{results} holds no experiment: no {EXPERIMENT} lies in it or in a folder of it. Make results with "
            "`pema compare` or `pema sweep`."
        )
    return [_read_experiment(folder) for folder in folders]


def _read_experiment(folder: Path) -> Experiment:
    about = require(read_json(folder / EXPERIMENT), folder / EXPERIMENT, FIELDS_OF_EXPERIMENT)
    if about["kind"] not in ("compare", "sweep"):
        raise DataError(f"{folder / EXPERIMENT}: kind is {about['kind']!r}, not 'compare' or 'sweep'.")
    for field in ("metrics", "methods"):
        names = [name for name in about[field] if isinstance(name, str)]
        if not names or len(set(names)) < len(about[field]):
            said = f"{field} is {short(about[field])}, not a list of different names"
            raise DataError(f"{folder / EXPERIMENT}: {said}. {_again(about)}")
    if about["kind"] == "sweep":
        require(about, folder / EXPERIMENT, {"axes": OBJECT})
    rows, differences = _read_comparison(folder / COMPARISON, about)
    metrics = tuple(dict.fromkeys([*about["metrics"], *rows[about["methods"][0]]["metrics"]]))
    runs = _read_runs(folder, about, metrics)
    for label, row in rows.items():
        if row["seeds"] != len(runs[label]):
            raise DataError(
                f"{folder / COMPARISON} counts {row['seeds']} seeds of {label!r}, but {len(runs[label])} runs lie "
                f"beside it. {_again(about)}"
            )
    outputs = _read_outputs(folder, about, runs)
    return Experiment(folder, about, metrics, rows, differences, runs, outputs, _read_examples(folder, about))


def _read_comparison(path: Path, about: Mapping[str, Any]) -> tuple[dict[str, dict[str, Any]], dict[str, Differences]]:
    found = require(read_json(path), path, {"rows": LIST, "differences": LIST})
    rows = {}
    for row in found["rows"]:
        require(row, path, {"label": TEXT, "seeds": NUMBER, "metrics": OBJECT}, "a row")
        where = f"the row of {row['label']!r}"
        metrics = dict.fromkeys([*about["metrics"], *found["rows"][0]["metrics"]])
        require(row["metrics"], path, dict.fromkeys(metrics, OBJECT), where)
        for metric in metrics:
            require(row["metrics"][metric], path, FIELDS_OF_INTERVAL, f"{metric} in {where}")
        rows[row["label"]] = row
    if set(rows) != set(about["methods"]) or about["reference"] not in (*rows, None):
        raise DataError(
            f"{path} has rows of {_names(rows)}, {EXPERIMENT} names {_names(about['methods'])} and the reference "
            f"{about['reference']!r}. {_again(about)}"
        )
    differences: dict[str, Differences] = {}
    for difference in found["differences"]:
        require(difference, path, FIELDS_OF_DIFFERENCE, "a difference")
        against = differences.setdefault(difference["reference"], {})
        against[difference["label"], difference["metric"]] = difference
    return rows, differences


def _read_runs(folder: Path, about: Mapping[str, Any], metrics: Sequence[str]) -> dict[str, list[dict[str, Any]]]:
    runs: dict[str, list[dict[str, Any]]] = {label: [] for label in about["methods"]}
    for path in sorted(folder.glob("*.json")):
        if path.name in (EXPERIMENT, COMPARISON):
            continue
        run = require(read_json(path), path, FIELDS_OF_RUN, remedy=f"Remove it and {_again(about, start='make')}")
        run["scores"] |= _scored_elsewhere(folder / COMET / path.name, metrics)
        for metric in metrics:
            require(run["scores"], path, {f"{metric}.value": NUMBER, f"{metric}.signature": TEXT}, "scores")
        for point in run["curve"]:
            require(point, path, FIELDS_OF_POINT, "a point of the curve")
        for trial in run["trials"]:
            require(trial, path, {"settings": OBJECT, "dev_perplexity": NUMBER_OR_NULL}, "a trial")
        if run["needs"]["weights"] not in WEIGHTS:
            raise DataError(f"{path}: needs.weights is {run['needs']['weights']!r}, not one of {_names(WEIGHTS)}.")
        if run["run"] != path.stem:
            raise DataError(f"{path} holds the run {run['run']!r}: name the file {run['run']}.json, or remove it.")
        if run["label"] not in runs:
            raise DataError(f"{path} is a run of {run['label']!r}, which {EXPERIMENT} does not name: remove it.")
        runs[run["label"]].append(run)
    for label, found in runs.items():
        if not found:
            raise DataError(f"{folder} holds no run of {label!r}. {_again(about)}")
        found.sort(key=lambda run: run["seed"])
    return runs


def _scored_elsewhere(path: Path, metrics: Sequence[str]) -> dict[str, Any]:
    """The score that another environment gave a run, where the comparison holds its metric."""
    if not path.exists():
        return {}
    found = require(read_json(path), path, {"metric": TEXT, "signature": TEXT, "segments": LIST})
    if found["metric"] not in metrics:
        return {}
    return {found["metric"]: {"value": fmean(found["segments"]), "signature": found["signature"]}}


def _read_outputs(
    folder: Path, about: Mapping[str, Any], runs: Mapping[str, list[dict[str, Any]]]
) -> dict[str, list[str]]:
    outputs = {}
    for run in (run["run"] for found in runs.values() for run in found):
        outputs[run] = read_lines(folder / f"{run}.txt")
        _require_count(folder / f"{run}.txt", len(outputs[run]), about)
    return outputs


def _read_examples(folder: Path, about: Mapping[str, Any]) -> list[Example] | None:
    if not (folder / TEST).exists():
        return None
    examples = read_examples(data=str(folder / TEST))
    _require_count(folder / TEST, len(examples), about)
    return examples


def _require_count(path: Path, count: int, about: Mapping[str, Any]) -> None:
    if count != about["data"]["test"]:
        raise DataError(f"{path} holds {count} lines for {about['data']['test']} test examples. {_again(about)}")


def _again(about: Mapping[str, Any], start: str = "Make") -> str:
    return f"{start} the results again with `pema {about['kind']}`."


def _names(labels: Any) -> str:  # noqa: ANN401
    return ", ".join(repr(label) for label in labels)
