"""What the page's table and plots are made of: means over seeds, and the values that its scripts read."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from pema.experiments.fields import ACCELERATOR, COSTS
from pema.experiments.formats import metric_name
from pema.experiments.records import Experiment


def cost(experiment: Experiment, label: str, name: str) -> dict[str, float] | None:
    """Mean and standard deviation over a method's seeds of one cost; None where it was not measured."""
    return _spread([run["costs"].get(name) for run in experiment.runs[label]])


def top(experiment: Experiment, metric: str) -> float:
    """The metric's largest mean."""
    return max(float(row["metrics"][metric]["mean"]) for row in experiment.rows.values())


def payload(experiment: Experiment) -> dict[str, Any]:
    """The values that the page's scripts draw; methods are named by their place in the table."""
    about, axes = experiment.about, list(experiment.about.get("axes", {}))
    first = {label: runs[0] for label, runs in experiment.runs.items()}
    return {
        "metrics": [{"key": name, "name": metric_name(name)} for name in experiment.metrics],
        "axes": axes,
        "reference": about["methods"].index(about["reference"]) if about["reference"] is not None else None,
        "methods": [
            {
                "label": label,
                "entry": _entry(label, first[label]["settings"], axes),
                "settings": {axis: first[label]["settings"][axis] for axis in axes if axis in first[label]["settings"]},
                "metrics": experiment.rows[label]["metrics"],
                "costs": {name: cost(experiment, label, name) for name in (*COSTS, ACCELERATOR)},
                "run": first[label]["run"],
                "output": experiment.outputs[first[label]["run"]],
            }
            for label in about["methods"]
        ],
        "runs": [
            {
                "method": place,
                "curve": [[point["epoch"], point["seconds"], point["held_out_loss"]] for point in run["curve"]],
            }
            for place, label in enumerate(about["methods"])
            for run in experiment.runs[label]
            if run["curve"]
        ],
        "examples": None if experiment.examples is None else [[e.source, e.target] for e in experiment.examples],
    }


def _entry(label: str, settings: Mapping[str, Any], axes: Sequence[str]) -> str:
    """What a sweep's line was called before its point of the grid came behind: `PEMA` of `PEMA, rank=16`."""
    points = [f", {axis}={settings[axis]}" for axis in axes if axis in settings]
    while any(map(label.endswith, points)):
        label = next(label.removesuffix(point) for point in points if label.endswith(point))
    return label


def _spread(values: Sequence[float | None]) -> dict[str, float] | None:
    known = [float(value) for value in values if value is not None]
    if not known:
        return None
    return {"mean": statistics.fmean(known), "std": statistics.stdev(known) if len(known) > 1 else 0.0}
