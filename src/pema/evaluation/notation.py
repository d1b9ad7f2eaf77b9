"""How a metric is written: its name and the digits behind its point, the same in the terminal, on pages and in docs."""

from __future__ import annotations

import math
from dataclasses import dataclass

NOTHING = "–"
"""What stands for a value that was not measured or is not finite."""

OF_100, OF_1 = 2, 3
"""Digits behind the point of what goes to 100 and of what goes to 1."""


@dataclass(frozen=True)
class Notation:
    """How the values of a metric are written.

    Attributes:
        title: the metric's name in headings.
        decimals: digits behind the point, whatever the value is.
    """

    title: str
    decimals: int


NOTATIONS = {
    "bleu": Notation("BLEU", OF_100),
    "chrf": Notation("chrF", OF_100),
    "rouge1": Notation("ROUGE-1", OF_100),
    "rouge2": Notation("ROUGE-2", OF_100),
    "rougeL": Notation("ROUGE-L", OF_100),
    "exact_match": Notation("EM", OF_100),
    "f1": Notation("F1", OF_100),
    "accuracy": Notation("accuracy", OF_1),
    "formality_accuracy": Notation("M-ACC", OF_1),
    "comet": Notation("COMET", 4),  # as COMET's own command writes it
    "perplexity": Notation("perplexity", 2),
    "dev_perplexity": Notation("dev perplexity", 2),
    "cross_entropy": Notation("cross-entropy", 3),
    "auc": Notation("AUC", 3),
    "tpr": Notation("TPR", 3),
}
"""By the metric's name, without what stands behind its colon."""


def notation(metric: str) -> Notation:
    """How to write a metric; one that is not in the table has a scale to 1, as classifiers' judgements have."""
    name, _, variant = metric.partition(":")
    known = NOTATIONS.get(name, Notation(name.replace("_", " "), OF_1))
    return Notation(f"{known.title} ({variant})", known.decimals) if variant else known


def metric_name(metric: str) -> str:
    """Name of a metric in headings."""
    return notation(metric).title


def score_text(metric: str, value: float | None, *, signed: bool = False) -> str:
    """Write a metric's value, or a difference of two with its sign."""
    if value is None or not math.isfinite(value):
        return NOTHING
    return f"{value:{'+' if signed else ''},.{notation(metric).decimals}f}"


def bounds_text(metric: str, low: float, high: float, *, signed: bool = False) -> str:
    """Write the ends of an interval."""
    return f"{score_text(metric, low, signed=signed)} to {score_text(metric, high, signed=signed)}"
