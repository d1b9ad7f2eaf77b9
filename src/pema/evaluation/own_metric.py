"""Metrics of a user's own, named `module:attribute` (see `pema.own`).

The attribute is a function of a hypothesis and its reference that returns a number, whose mean over the texts is the
metric (of several references, the highest number counts); or a `Metric`, or a class of metrics that takes no arguments.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from pema.errors import ConfigError
from pema.evaluation.mean import Mean
from pema.evaluation.score import Metric
from pema.own import own, source_digest

MEMBERS = ("statistics", "value", "signature")
"""Members of a `Metric`."""


def own_metric(name: str) -> Metric:
    """Return the metric called `module:attribute`.

    Raises:
        ConfigError: it cannot be imported, or is neither a function nor a metric.
    """
    value = own(name, "metric")
    if isinstance(value, type):
        try:
            value = value()
        except TypeError as error:
            raise ConfigError(f"metric {name!r} is a class that cannot be used without arguments: {error}.") from error
    if all(callable(getattr(value, member, None)) for member in MEMBERS):
        metric: Metric = value
        return metric
    if not callable(value):
        raise ConfigError(
            f"metric {name!r} is {type(value).__name__}: name a function of a hypothesis and a reference, or a metric."
        )
    return Mean(_checked(value, name), f"{name}@{(source_digest(name) or 'unknown')[:12]}", 1.0)


def _checked(function: Callable[[str, str], float], name: str) -> Callable[[str, str], float]:
    """Return `function` with a check of its value."""

    def segment(hypothesis: str, reference: str) -> float:
        try:
            value = function(hypothesis, reference)
        except Exception as error:
            raise ConfigError(f"metric {name!r} failed with {type(error).__name__}: {error}. Correct it.") from error
        if not isinstance(value, int | float) or not math.isfinite(value):
            raise ConfigError(f"metric {name!r} returned {value!r} for {hypothesis!r}: return a finite number.")
        return float(value)

    return segment
