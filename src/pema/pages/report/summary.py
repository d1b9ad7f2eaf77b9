"""The data of the report's scripts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pema.evaluation.notation import metric_name, score_text
from pema.experiments.formats import mean_text
from pema.experiments.records import ACCELERATOR, CUT_TEXTS, Costs, Results

COSTS = (*(name for name in Costs.__dataclass_fields__ if name not in (ACCELERATOR, CUT_TEXTS)), ACCELERATOR)


def payload(experiment: Results) -> dict[str, Any]:
    """Return the values that the page's scripts draw; methods are identified by their row in the table."""
    about, axes = experiment.about, list(experiment.about.axes or {})
    first = {label: runs[0] for label, runs in experiment.runs.items()}
    return {
        "metrics": [{"key": name, "name": metric_name(name)} for name in experiment.metrics],
        "axes": axes,
        "reference": about.methods.index(about.reference) if about.reference is not None else None,
        "methods": [
            {
                "label": label,
                "entry": _entry(label, first[label].settings, axes),
                "settings": {axis: first[label].settings[axis] for axis in axes if axis in first[label].settings},
                "metrics": {name: _score(experiment, label, name) for name in experiment.metrics},
                "costs": {name: _cost(experiment, label, name) for name in COSTS},
                "run": first[label].run,
                "output": experiment.outputs[first[label].run],
            }
            for label in about.methods
        ],
        "runs": [
            {
                "method": row,
                "curve": [[point.epoch, point.seconds, point.held_out_loss] for point in run.curve],
            }
            for row, label in enumerate(about.methods)
            for run in experiment.runs[label]
            if run.curve
        ],
        "examples": None if experiment.examples is None else [[e.source, e.references] for e in experiment.examples],
    }


def _score(experiment: Results, label: str, metric: str) -> dict[str, Any]:
    """Return a mean, its interval, and its text in the table: `text`, and `spread_text` with the spread over seeds."""
    interval = experiment.rows[label].metrics[metric]
    text = {"text": score_text(metric, interval.mean), "spread_text": mean_text(metric, interval)}
    return interval.to_dict() | text


def _cost(experiment: Results, label: str, name: str) -> dict[str, float] | None:
    mean = experiment.cost(label, name)
    return None if mean is None else {"mean": mean, "std": experiment.cost_spread(label, name)}


def _entry(label: str, settings: Mapping[str, Any], axes: Sequence[str]) -> str:
    """Return the label of a sweep's line without its point of the grid: `PEMA` of `PEMA, rank=16`."""
    points = [f", {axis}={settings[axis]}" for axis in axes if axis in settings]
    while any(map(label.endswith, points)):
        label = next(label.removesuffix(point) for point in points if label.endswith(point))
    return label
