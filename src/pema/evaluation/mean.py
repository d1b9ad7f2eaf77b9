"""Metrics that average one number per segment."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from pema.evaluation.score import Array, Reference, all_valid, references_part


@dataclass(frozen=True)
class Mean:
    """Metric that is the mean of `segment(hypothesis, reference)` over the corpus, times `scale`.

    Of several references, the one with the highest value counts, as in the scorers of SQuAD and ROUGE.
    """

    segment: Callable[[str, str], float]
    description: str
    scale: float

    def statistics(self, hypotheses: Sequence[str], references: Sequence[Reference]) -> Array:
        """Return (n, 3): the number of each segment, 1 as its count, and the number of its references."""
        pairs = zip(hypotheses, all_valid(references), strict=True)
        return np.array(
            [(max(self.segment(text, gold) for gold in texts), 1.0, len(texts)) for text, texts in pairs], np.float64
        )

    def value(self, totals: Array) -> float:
        """Return the scaled mean."""
        return float(self.scale * totals[0] / totals[1])

    def signature(self, totals: Array) -> str:
        """Return what is averaged, the number of segments, and that of references if there are more."""
        refs = references_part(totals[1], totals[2])
        return f"{self.description}|n:{int(totals[1])}{refs}|scale:{self.scale:g}"
