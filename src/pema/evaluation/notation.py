"""Names and decimal places of metrics, the same in the terminal, on pages and in the documentation."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from pema.own import is_own

STYLE = ("style_probability", "style_accuracy", "style_improvement")
"""The measures of `pema.evaluation.style`, which follow with a colon and a classifier."""

NOTHING = "–"
"""Text for a value that was not measured or is not finite."""

OF_100, OF_1 = 2, 3
"""Decimal places of metrics on a scale to 100 and of metrics on a scale to 1."""


@dataclass(frozen=True)
class Notation:
    """Notation of a metric.

    Attributes:
        title: name of the metric in headings.
        decimals: number of decimal places, for every value.
        lower_is_better: whether a lower value is the better one.
    """

    title: str
    decimals: int
    lower_is_better: bool = False


NOTATIONS = {
    "bleu": Notation("BLEU", OF_100),
    "chrf": Notation("chrF", OF_100),
    "rouge1": Notation("ROUGE-1", OF_100),
    "rouge2": Notation("ROUGE-2", OF_100),
    "rougeL": Notation("ROUGE-L", OF_100),
    "exact_match": Notation("EM", OF_100),
    "verbatim_match": Notation("verbatim EM", OF_100),
    "f1": Notation("F1", OF_100),
    "accuracy": Notation("accuracy", OF_1),
    "label_accuracy": Notation("label accuracy", OF_1),
    "formality_accuracy": Notation("M-ACC", OF_1),
    "sari": Notation("SARI", OF_100),
    "slot_errors": Notation("SER", OF_100, lower_is_better=True),
    "comet": Notation("COMET", 4),  # as COMET's own command prints it
    "perplexity": Notation("perplexity", 2, lower_is_better=True),
    "dev_perplexity": Notation("dev perplexity", 2, lower_is_better=True),
    "cross_entropy": Notation("cross-entropy", 3, lower_is_better=True),
    "auc": Notation("AUC", 3),
    "tpr": Notation("TPR", 3),
}
"""Notations by the name of the metric, without the part after its colon."""


def notation(metric: str) -> Notation:
    """Return the notation of a metric; one that is not in the table has a scale to 1, like classifier scores."""
    name, _, variant = metric.partition(":")
    if is_own(metric) and name not in NOTATIONS and not name.startswith("style_"):
        return Notation(variant.replace("_", " "), OF_1)
    known = NOTATIONS.get(name, Notation(name.replace("_", " "), OF_1))
    return replace(known, title=f"{known.title} ({variant})") if variant else known


def is_better(metric: str, difference: float) -> bool:
    """Return whether a system whose value differs by `difference` from another's is the better one."""
    return difference < 0 if notation(metric).lower_is_better else difference > 0


def is_style(metric: str) -> bool:
    """Return whether a metric is measured by a classifier."""
    return metric.partition(":")[0] in STYLE


def metric_name(metric: str) -> str:
    """Return the name of a metric in headings."""
    return notation(metric).title


def score_text(metric: str, value: float | None, *, signed: bool = False) -> str:
    """Format a value of a metric, or a signed difference of two values."""
    if value is None or not math.isfinite(value):
        return NOTHING
    return f"{value:{'+' if signed else ''},.{notation(metric).decimals}f}"


def bounds_text(metric: str, low: float, high: float, *, signed: bool = False) -> str:
    """Format the bounds of an interval."""
    return f"{score_text(metric, low, signed=signed)} to {score_text(metric, high, signed=signed)}"
