"""Metrics that are the mean of a number per segment."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from pema.evaluation.score import Array


@dataclass(frozen=True)
class Mean:
    """The mean of `segment(hypothesis, reference)` over the corpus, times `scale`."""

    segment: Callable[[str, str], float]
    description: str
    scale: float

    def statistics(self, hypotheses: Sequence[str], references: Sequence[str]) -> Array:
        """The segment's number and 1, which counts it: (n, 2)."""
        pairs = zip(hypotheses, references, strict=True)
        return np.array([(self.segment(*pair), 1.0) for pair in pairs], np.float64)

    def value(self, totals: Array) -> float:
        """The mean, scaled."""
        return float(self.scale * totals[0] / totals[1])

    def signature(self, totals: Array) -> str:
        """What is averaged, over how many segments."""
        return f"{self.description}|n:{int(totals[1])}|scale:{self.scale:g}"
