"""The table of a comparison, for a terminal."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from rich.table import Table

from pema.experiments.layout import COMPARISON, EXPERIMENT
from pema.files import read_json

NAMES = {
    "bleu": "BLEU",
    "chrf": "chrF",
    "rouge1": "ROUGE-1",
    "rouge2": "ROUGE-2",
    "rougeL": "ROUGE-L",
    "exact_match": "EM",
    "f1": "F1",
    "accuracy": "accuracy",
    "formality_accuracy": "M-ACC",
    "comet": "COMET",
}
Differences = dict[tuple[str, str], Mapping[str, Any]]
WEIGHTS = {"none": "", "some": "some weights", "all": "weights"}


def comparison_tables(folder: Path) -> list[Table]:
    """Quality with its 95 % interval; then costs, and what each method needs of the PLM owner."""
    experiment, comparison = read_json(folder / EXPERIMENT), read_json(folder / COMPARISON)
    runs = comparison["signature"]["config"]["runs"]
    quality, costs = Table(title=experiment["title"]), Table()
    for table in (quality, costs):
        table.add_column("")
    metrics = list(comparison["rows"][0]["metrics"])
    for name in metrics:
        quality.add_column(NAMES.get(name, name), justify="right")
    for title in ("trained", "peak memory", "training", "a token", "disk"):
        costs.add_column(title, justify="right")
    costs.add_column("needs")
    differences = by_reference(comparison)
    marked = differences.get(experiment["reference"], {})
    for row in comparison["rows"]:
        results = [read_json(folder / f"{name}.json") for name in runs[row["label"]]]
        scores = (_score(row["metrics"][name], marked.get((row["label"], name))) for name in metrics)
        quality.add_row(row["label"], *scores)
        costs.add_row(row["label"], *_costs(results), needs_in_words(results[0]["needs"]))
    quality.caption = "mean over seeds ± standard deviation (95 % interval over test sentences)"
    if experiment["reference"] is not None:
        quality.caption += f"; + better, - worse than {experiment['reference']}, p < 0.05"
    digits = {name: _digits(row["metrics"][name] for row in comparison["rows"]) for name in metrics}
    further = [reference for reference in differences if reference != experiment["reference"]]
    return [quality, costs, *(_against(reference, differences[reference], digits) for reference in further)]


def by_reference(comparison: Mapping[str, Any]) -> dict[str, Differences]:
    """The differences of a comparison: by what the others are compared with, and then by label and metric."""
    found: dict[str, Differences] = {}
    for each in comparison["differences"]:
        found.setdefault(each["reference"], {})[each["label"], each["metric"]] = each
    return found


def _against(reference: str, found: Differences, digits: Mapping[str, int]) -> Table:
    """What every line has more than `reference`, with the interval and p of the paired bootstrap."""
    table = Table(title=f"less {reference}")
    table.add_column("")
    for name in digits:
        table.add_column(NAMES.get(name, name), justify="right")
    for label in dict.fromkeys(label for label, _ in found):
        table.add_row(label, *(difference_in_words(found[label, name], digits[name]) for name in digits))
    table.caption = "difference of means (95 % interval over test sentences), p"
    return table


def difference_in_words(found: Mapping[str, Any], digits: int) -> str:
    """A difference, its interval and p."""
    low, high = (f"{found[name]:+.{digits}f}" for name in ("low", "high"))
    return f"{found['difference']:+.{digits}f} ({low}, {high}) {found['p_value']:.3f}"


def _score(interval: Mapping[str, Any], difference: Mapping[str, Any] | None) -> str:
    digits = _digits([interval])
    text = f"{interval['mean']:.{digits}f}"
    if interval["std"] is not None:
        text += f" ± {interval['std']:.{digits}f}"
    text += f" ({interval['low']:.{digits}f}, {interval['high']:.{digits}f})"
    if difference is not None:
        text += (" +" if difference["difference"] > 0 else " -") if difference["significant"] else "  "
    return text


def _digits(intervals: Iterable[Mapping[str, Any]]) -> int:
    """Digits behind the point: a metric goes to 100 or to 1."""
    return 1 if any(interval["high"] > 2 for interval in intervals) else 2


def _costs(results: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    """Means over the runs, in units for people."""
    costs = [result["costs"] for result in results]
    mean = {name: fmean(cost[name] for cost in costs) for name in costs[0]}
    return (
        f"{mean['trainable_parameters']:,.0f}",
        f"{mean['train_peak_bytes'] / 1e6:,.0f} MB",
        f"{mean['train_seconds']:,.0f} s",
        f"{mean['seconds_per_token'] * 1e3:.2f} ms",
        f"{mean['disk_bytes'] / 1e6:,.1f} MB",
    )


def needs_in_words(needs: Mapping[str, Any]) -> str:
    """What a method needs of the PLM owner, in a few words."""
    words = [
        WEIGHTS[needs["weights"]],
        "targets at owner" if needs["targets_at_owner"] else "",
        "gradients" if needs["gradients"] else "",
    ]
    return ", ".join(filter(None, words)) or "-"
