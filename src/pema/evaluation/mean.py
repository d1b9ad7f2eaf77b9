"""Metrics that average one number per segment."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from pema.evaluation.score import Array


@dataclass(frozen=True)
class Mean:
    """Metric that is the mean of `segment(hypothesis, reference)` over the corpus, times `scale`."""

    segment: Callable[[str, str], float]
    description: str
    scale: float

    def statistics(self, hypotheses: Sequence[str], references: Sequence[str]) -> Array:
        """Return (n, 2): the number of each segment, and 1 as its count."""
        pairs = zip(hypotheses, references, strict=True)
        return np.array([(self.segment(*pair), 1.0) for pair in pairs], np.float64)

    def value(self, totals: Array) -> float:
        """Return the scaled mean."""
        return float(self.scale * totals[0] / totals[1])

    def signature(self, totals: Array) -> str:
        """Return what is averaged, and the number of segments."""
        return f"{self.description}|n:{int(totals[1])}|scale:{self.scale:g}"
