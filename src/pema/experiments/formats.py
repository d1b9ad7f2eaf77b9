"""Numbers as a reader wants them: few digits, one unit, the same everywhere on the page."""

from __future__ import annotations

import math

from pema.experiments.table import NAMES

NOTHING = "–"


def metric_name(metric: str) -> str:
    """Name of a metric in headings."""
    return NAMES.get(metric, metric.replace("_", " "))


def score(value: float | None, top: float, *, signed: bool = False) -> str:
    """Write a score or a difference of scores; `top` is the metric's largest, which tells 0 to 1 from 0 to 100."""
    if value is None or not math.isfinite(value):
        return NOTHING
    text = f"{value:{'+' if signed else ''}.{3 if top <= 1.5 else 2}f}"
    return text.replace("-", "−")


def p_value(value: float) -> str:
    """Write a p-value as in a paper."""
    return "p < .001" if value < 0.001 else f"p = {value:.3f}".replace("0.", ".")


def scaled(value: float | None, unit: str = "") -> str:
    """Write a cost with three digits and a decimal prefix: 12.3 MB is 12,300,000 bytes."""
    if value is None or not math.isfinite(value):
        return NOTHING
    for power, prefix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= 0.9995 * power:
            return f"{digits(value / power)} {prefix}{unit}"
    return f"{value:.0f} {unit}".rstrip()


def seconds(value: float | None) -> str:
    """Write a duration in seconds, or in milliseconds below a tenth of one."""
    if value is None or not math.isfinite(value):
        return NOTHING
    return f"{digits(value * 1000)} ms" if 0 < value < 0.1 else f"{digits(value)} s"


def digits(value: float) -> str:
    """Write three digits, and all of those before the point."""
    if value == 0:
        return "0"
    # Rounding comes first: 0.9996 has one digit before the point once it is written with three.
    places = max(0, 2 - math.floor(math.log10(abs(float(f"{value:.3g}")))))
    return f"{value:,.{places}f}"
