"""What a metric is, and the number that it gives: never without its signature."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from pema.errors import DataError

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Score:
    """A metric's value.

    Attributes:
        value: on the scale of the metric's official scorer: 0 to 100 for BLEU, chrF, ROUGE, exact match and F1, 0 to 1
            for the accuracies.
        signature: what was computed and how, so that the number can be made again.
    """

    value: float
    signature: str


class Metric(Protocol):
    """A corpus metric as a function of summed statistics, so that any resample of a corpus is scored at once."""

    def statistics(self, hypotheses: Sequence[str], references: Sequence[str]) -> Array:
        """Statistics of each segment: (n, k)."""

    def value(self, totals: Array) -> float:
        """The metric of a corpus whose statistics sum to `totals`, (k,)."""

    def signature(self, totals: Array) -> str:
        """What the metric computes and how."""


def score(metric: Metric, hypotheses: Sequence[str], references: Sequence[str]) -> Score:
    """Score a corpus.

    Raises:
        DataError: there is nothing to score, or hypotheses and references are not aligned.
    """
    require_aligned(hypotheses=hypotheses, references=references)
    totals = metric.statistics(hypotheses, references).sum(0)
    return Score(metric.value(totals), metric.signature(totals))


def require_aligned(**texts: Sequence[str]) -> None:
    """Refuse lists of different lengths, or of none.

    Raises:
        DataError: names the lists and how long they are.
    """
    lengths = {name: len(found) for name, found in texts.items()}
    if len(set(lengths.values())) > 1:
        counted = ", ".join(f"{length} {name}" for name, length in lengths.items())
        raise DataError(f"not aligned: {counted}. Give one of each a line, in the same order.")
    if not all(lengths.values()):
        raise DataError(f"nothing to score: there are no {' and no '.join(lengths)}.")
