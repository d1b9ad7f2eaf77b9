"""The table of a comparison, for a terminal."""

from __future__ import annotations

from pathlib import Path

from rich.table import Table

from pema.evaluation.notation import bounds_text, metric_name
from pema.experiments.formats import COSTS, difference_text, mean_text, needs_text
from pema.experiments.reader import read_folder
from pema.experiments.records import Difference, Interval, Results

TITLES = {
    "trainable_parameters": "trained",
    "train_peak_bytes": "peak memory",
    "train_peak_accelerator_bytes": "accelerator",
    "train_seconds": "training",
    "seconds_per_token": "a token",
    "disk_bytes": "disk",
}
"""Short headings of the costs, for narrow terminals."""


def comparison_tables(folder: Path) -> list[Table]:
    """Quality with its 95 % interval; then costs, and what each method needs of the PLM owner.

    Raises:
        DataError: the folder holds no results, or they are damaged.
    """
    results = read_folder(folder)
    reference = results.about.reference
    quality, costs = Table(title=results.about.title), Table()
    for table in (quality, costs):
        table.add_column("")
    for name in results.metrics:
        quality.add_column(metric_name(name), justify="right")
    columns = results.cost_columns(COSTS)
    for name in columns:
        costs.add_column(TITLES[name], justify="right")
    costs.add_column("needs")
    for label, row in results.rows.items():
        scores = (
            _score(name, row.metrics[name], results.difference(reference, label, name)) for name in results.metrics
        )
        quality.add_row(label, *scores)
        spent = (COSTS[name].text(results.cost(label, name)) for name in columns)
        costs.add_row(label, *spent, needs_text(results.runs[label][0].needs))
    quality.caption = "mean over seeds ± standard deviation (95 % interval over test sentences)"
    if reference is not None:
        quality.caption += f"; + better, - worse than {reference}, p < 0.05"
    further = [each for each in results.differences if each != reference]
    return [quality, costs, *(_against(results, each) for each in further)]


def _against(results: Results, reference: str) -> Table:
    """By how much every line differs from `reference`, with the interval and p of the paired bootstrap."""
    table = Table(title=f"difference from {reference}")
    table.add_column("")
    for name in results.metrics:
        table.add_column(metric_name(name), justify="right")
    differences = results.differences[reference]
    for label in dict.fromkeys(label for label, _ in differences):
        table.add_row(label, *(difference_text(name, differences[label, name]) for name in results.metrics))
    table.caption = "difference of means (95 % interval over test sentences), p"
    return table


def _score(name: str, interval: Interval, difference: Difference | None) -> str:
    text = f"{mean_text(name, interval)} ({bounds_text(name, interval.low, interval.high)})"
    if difference is None:
        return text
    return f"{text} {difference.mark or ' '}"
