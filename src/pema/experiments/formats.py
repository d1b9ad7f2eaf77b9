"""Formats of results: few digits, one unit, and the same text for the same value in every table."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from pema.evaluation.notation import NOTHING, bounds_text, score_text
from pema.experiments.records import ACCELERATOR, CUT_TEXTS, Difference, Interval, Needs, Results, Row

SIGNIFICANT_DIGITS = 3


def mean_text(metric: str, interval: Interval) -> str:
    """Format the mean over seeds, and their standard deviation if there are several."""
    text = score_text(metric, interval.mean)
    return text if interval.std is None else f"{text} ± {score_text(metric, interval.std)}"


def score_cell(metric: str, interval: Interval, difference: Difference | None, test: int) -> str:
    """Format a mean, its interval, its number of texts, and the mark of its difference from the reference."""
    parts = [
        f"{mean_text(metric, interval)} ({bounds_text(metric, interval.low, interval.high)})",
        texts_text(interval, test),
        "" if difference is None else difference.mark or " ",
    ]
    return " ".join(filter(None, parts))


def texts_text(interval: Interval, test: int) -> str:
    """Format the number of test texts that a value rests on; "" if these are all."""
    return "" if interval.texts is None else f"on {interval.texts:,} of {test:,}"


NOT_HELPED = "†"
"""Mark of a line with runs whose training did not help."""

REASONS = {
    "step 0": "the held-out loss never fell, so the weights of step 0 were kept",
    "same texts": "the texts are those of the PLM alone",
}
"""Explanations of `NoHelp.reason`."""


def no_help_text(rows: Iterable[Row]) -> str:
    """Format the footnote about runs whose training did not help; "" if there are none."""
    runs: dict[str, list[str]] = {}
    for flag in (flag for row in rows for flag in row.no_help or ()):
        runs.setdefault(flag.reason, []).append(flag.run)
    causes = "; ".join(f"{REASONS[reason]} ({', '.join(names)})" for reason, names in runs.items())
    return f"{NOT_HELPED} Training did not help: {causes}." if causes else ""


def missing_text(results: Results) -> str:
    """Format the names of the planned runs that are missing from a table; "" if none are."""
    parts = []
    if results.missing:
        parts.append(f"Not finished: {', '.join(results.missing)}.")
    if results.uncompared:
        parts.append(f"Finished, but not in the table yet: {', '.join(results.uncompared)}.")
    return " ".join([*parts, f"Run `pema {results.about.kind}` again: it continues."]) if parts else ""


def difference_text(metric: str, difference: Difference) -> str:
    """Format a difference, its interval and its p-value."""
    value = score_text(metric, difference.difference, signed=True)
    bounds = bounds_text(metric, difference.low, difference.high, signed=True)
    return f"{value} ({bounds}), {p_value(difference.p_value)}"


def p_value(value: float) -> str:
    """Format a p-value with three decimals, the resolution of a bootstrap of a thousand samples."""
    return "p < 0.001" if value < 0.001 else f"p = {value:.3f}"


def scaled(value: float | None, unit: str = "") -> str:
    """Format a cost with three digits and a decimal prefix: 12.3 MB is 12,300,000 bytes."""
    if value is None or not math.isfinite(value):
        return NOTHING
    for power, prefix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= 0.9995 * power:
            return f"{digits(value / power)} {prefix}{unit}"
    return f"{value:.0f} {unit}".rstrip()


def count(value: float | None) -> str:
    """Format a number of things, or its mean over seeds."""
    return NOTHING if value is None else f"{value:,.1f}".removesuffix(".0")


def size(value: float | None) -> str:
    """Format a number of bytes."""
    return scaled(value, "B")


def seconds(value: float | None) -> str:
    """Format a duration in seconds, or below 0.1 seconds in milliseconds."""
    if value is None or not math.isfinite(value):
        return NOTHING
    return f"{digits(value * 1000)} ms" if 0 < value < 0.1 else f"{digits(value)} s"


def digits(value: float) -> str:
    """Format a number with three digits, or with all digits of its integer part."""
    if value == 0:
        return "0"
    # Rounding comes first: 0.9996 rounded to three digits is 1.00, with one digit before the point.
    rounded = abs(float(f"{value:.{SIGNIFICANT_DIGITS}g}"))
    places = max(0, SIGNIFICANT_DIGITS - 1 - math.floor(math.log10(rounded)))
    return f"{value:,.{places}f}"


@dataclass(frozen=True)
class Column:
    """A column of costs: its heading and the format of its values."""

    title: str
    text: Callable[[float | None], str]


COSTS = {
    "trainable_parameters": Column("Trainable parameters", scaled),
    "train_peak_bytes": Column("Peak training memory", size),
    ACCELERATOR: Column("Peak accelerator memory", size),
    "train_seconds": Column("Training time", seconds),
    "seconds_per_token": Column("Time per token", seconds),
    "disk_bytes": Column("Disk", size),
    CUT_TEXTS: Column("Cut texts", count),
}
"""Columns of costs in tables, in order, by the field of `Costs`."""

WEIGHTS = {"none": "", "some": "some weights", "all": "weights"}


def needs_text(needs: Needs) -> str:
    """Format what a method needs from the PLM owner, in a few words."""
    words = [
        WEIGHTS[needs.weights],
        "targets at owner" if needs.targets_at_owner else "",
        "gradients" if needs.gradients else "",
    ]
    return ", ".join(filter(None, words)) or NOTHING
