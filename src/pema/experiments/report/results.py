"""The result folders that a report is made from, read and held to their format."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from pema.errors import DataError
from pema.files import read_json
from pema.tasks.example import Example
from pema.tasks.readers import read_examples, read_lines

EXPERIMENT = "experiment.json"
COMPARISON = "comparison.json"
EXAMPLES = "examples.jsonl"
ELSEWHERE = "comet"
"""Folder of the scores that `recipes/comet_score.py` gave the runs."""

WEIGHTS = ("none", "some", "all")

NUMBER = ((int, float), "a number")
NUMBER_OR_NULL = ((int, float, type(None)), "a number or null")
TEXT = ((str,), "text")
TEXT_OR_NULL = ((str, type(None)), "text or null")
LIST = ((list,), "a list")
OBJECT = ((dict,), "an object")
BOOLEAN = ((bool,), "true or false")
ANYTHING = ((object,), "anything")

Kind = tuple[tuple[type, ...], str]
SIGNATURE: dict[str, Kind] = {
    "signature.config": OBJECT,
    "signature.seed": ANYTHING,
    "signature.versions": OBJECT,
    "signature.commit": ANYTHING,
    "signature.machine": OBJECT,
}
FIELDS_OF_EXPERIMENT: dict[str, Kind] = {
    **dict.fromkeys(("name", "title", "kind", "task", "data.name", "data.sha256", "plm.name"), TEXT),
    "reference": TEXT_OR_NULL,
    **dict.fromkeys(("data.train", "data.dev", "data.test", "plm.d", "plm.vocabulary_size", "plm.parameters"), NUMBER),
    **dict.fromkeys(("seeds", "metrics", "methods"), LIST),
    **SIGNATURE,
}
FIELDS_OF_INTERVAL: dict[str, Kind] = {"mean": NUMBER, "std": NUMBER_OR_NULL, "low": NUMBER, "high": NUMBER}
FIELDS_OF_DIFFERENCE: dict[str, Kind] = {
    **dict.fromkeys(("label", "reference", "metric"), TEXT),
    **dict.fromkeys(("difference", "low", "high", "p_value"), NUMBER),
    "significant": BOOLEAN,
}
COSTS = (
    "trainable_parameters",
    "prepare_seconds",
    "train_seconds",
    "train_peak_bytes",
    "seconds_per_token",
    "generated_tokens",
    "disk_bytes",
)
ACCELERATOR = "train_peak_accelerator_bytes"
"""A cost that only runs on an accelerator have."""
FIELDS_OF_RUN: dict[str, Kind] = {
    **dict.fromkeys(("run", "label", "method", "needs.weights"), TEXT),
    "settings": OBJECT,
    "seed": NUMBER,
    "scores": OBJECT,
    "dev_perplexity": NUMBER_OR_NULL,
    "trials": LIST,
    **{f"costs.{name}": NUMBER_OR_NULL for name in COSTS},
    "needs.targets_at_owner": BOOLEAN,
    "needs.gradients": BOOLEAN,
    "curve": LIST,
    **SIGNATURE,
}
FIELDS_OF_POINT: dict[str, Kind] = {"epoch": NUMBER, "seconds": NUMBER, "held_out_loss": NUMBER}


@dataclass(frozen=True)
class Experiment:
    """One comparison or sweep.

    Attributes:
        folder: where its results lie.
        about: `experiment.json`.
        metrics: names, the leading one first; after those of `experiment.json` those that `comparison.json` adds to it.
        rows: of `comparison.json`, by label.
        differences: of `comparison.json`, by label and metric: against the reference.
        runs: every run's result by label, in the order of the methods and then of the seeds.
        outputs: hypotheses of the test examples, by run.
        examples: the test examples, or None where the results do not hold them.
    """

    folder: Path
    about: dict[str, Any]
    metrics: tuple[str, ...]
    rows: dict[str, dict[str, Any]]
    differences: dict[tuple[str, str], dict[str, Any]]
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
    about = _require(read_json(folder / EXPERIMENT), folder / EXPERIMENT, FIELDS_OF_EXPERIMENT)
    if about["kind"] not in ("compare", "sweep"):
        raise DataError(f"{folder / EXPERIMENT}: kind is {about['kind']!r}, not 'compare' or 'sweep'.")
    for field in ("metrics", "methods"):
        names = [name for name in about[field] if isinstance(name, str)]
        if not names or len(set(names)) < len(about[field]):
            said = f"{field} is {_short(about[field])}, not a list of different names"
            raise DataError(f"{folder / EXPERIMENT}: {said}. {_again(about)}")
    if about["kind"] == "sweep":
        _require(about, folder / EXPERIMENT, {"axes": OBJECT})
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


def _read_comparison(
    path: Path, about: Mapping[str, Any]
) -> tuple[dict[str, dict[str, Any]], dict[tuple[str, str], dict[str, Any]]]:
    found = _require(read_json(path), path, {"rows": LIST, "differences": LIST})
    rows = {}
    for row in found["rows"]:
        _require(row, path, {"label": TEXT, "seeds": NUMBER, "metrics": OBJECT}, "a row")
        where = f"the row of {row['label']!r}"
        metrics = dict.fromkeys([*about["metrics"], *found["rows"][0]["metrics"]])
        _require(row["metrics"], path, dict.fromkeys(metrics, OBJECT), where)
        for metric in metrics:
            _require(row["metrics"][metric], path, FIELDS_OF_INTERVAL, f"{metric} in {where}")
        rows[row["label"]] = row
    if set(rows) != set(about["methods"]) or about["reference"] not in (*rows, None):
        raise DataError(
            f"{path} has rows of {_names(rows)}, {EXPERIMENT} names {_names(about['methods'])} and the reference "
            f"{about['reference']!r}. {_again(about)}"
        )
    differences = {}
    for difference in found["differences"]:
        _require(difference, path, FIELDS_OF_DIFFERENCE, "a difference")
        if difference["reference"] == about["reference"]:
            differences[difference["label"], difference["metric"]] = difference
    return rows, differences


def _read_runs(folder: Path, about: Mapping[str, Any], metrics: Sequence[str]) -> dict[str, list[dict[str, Any]]]:
    runs: dict[str, list[dict[str, Any]]] = {label: [] for label in about["methods"]}
    for path in sorted(folder.glob("*.json")):
        if path.name in (EXPERIMENT, COMPARISON):
            continue
        run = _require(read_json(path), path, FIELDS_OF_RUN, remedy=f"Remove it and {_again(about, start='make')}")
        run["scores"] |= _scored_elsewhere(folder / ELSEWHERE / path.name, metrics)
        for metric in metrics:
            _require(run["scores"], path, {f"{metric}.value": NUMBER, f"{metric}.signature": TEXT}, "scores")
        for point in run["curve"]:
            _require(point, path, FIELDS_OF_POINT, "a point of the curve")
        for trial in run["trials"]:
            _require(trial, path, {"settings": OBJECT, "dev_perplexity": NUMBER_OR_NULL}, "a trial")
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
    found = _require(read_json(path), path, {"metric": TEXT, "signature": TEXT, "segments": LIST})
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
    if not (folder / EXAMPLES).exists():
        return None
    examples = read_examples(data=str(folder / EXAMPLES))
    _require_count(folder / EXAMPLES, len(examples), about)
    return examples


def _require_count(path: Path, count: int, about: Mapping[str, Any]) -> None:
    if count != about["data"]["test"]:
        raise DataError(f"{path} holds {count} lines for {about['data']['test']} test examples. {_again(about)}")


def _require(value: Any, path: Path, fields: Mapping[str, Kind], where: str = "", remedy: str = "") -> dict[str, Any]:  # noqa: ANN401
    """Hold a JSON object to its fields; a dot stands between the names of nested ones."""
    within = f"{where} " if where else ""
    remedy = remedy or "It is damaged or of an older version: make the results again."
    if not isinstance(value, dict):
        raise DataError(f"{path}: {where} is {_short(value)}, not an object. {remedy}")
    for field, (types, kind) in fields.items():
        found: Any = value
        for name in field.split("."):
            if not isinstance(found, dict) or name not in found:
                raise DataError(f"{path}: {within}has no field {field!r}. {remedy}")
            found = found[name]
        if not isinstance(found, types) or (isinstance(found, bool) and bool not in types and object not in types):
            raise DataError(f"{path}: {within}has {_short(found)} as {field!r}, not {kind}. {remedy}")
    return value


def _again(about: Mapping[str, Any], start: str = "Make") -> str:
    return f"{start} the results again with `pema {about['kind']}`."


def _names(labels: Any) -> str:  # noqa: ANN401
    return ", ".join(repr(label) for label in labels)


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
