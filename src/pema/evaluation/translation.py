"""BLEU and chrF, computed and signed by sacreBLEU."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from sacrebleu.metrics import BLEU, CHRF

from pema.evaluation.score import Array


class SacreBLEU:
    """A metric of sacreBLEU, 0 to 100."""

    def __init__(self, name: str, metric: Any) -> None:  # noqa: ANN401 - sacreBLEU is untyped
        self.name = name
        self.metric = metric

    def statistics(self, hypotheses: Sequence[str], references: Sequence[str]) -> Array:
        """N-gram counts of each segment: (n, k)."""
        return np.array(self.metric._extract_corpus_statistics(hypotheses, [references]), np.float64)

    def value(self, totals: Array) -> float:
        """The corpus score of summed counts."""
        return float(self.metric._compute_score_from_stats([int(count) for count in totals]).score)

    def signature(self, totals: Array) -> str:
        """SacreBLEU's own signature."""
        return f"{self.name}|{self.metric.get_signature()}"


def bleu() -> SacreBLEU:
    """BLEU with sacreBLEU's defaults: mixed case, tokenizer 13a, exponential smoothing."""
    return SacreBLEU("BLEU", BLEU())


def chrf() -> SacreBLEU:
    """ChrF2 with sacreBLEU's defaults: character 6-grams, no words, beta 2."""
    return SacreBLEU("chrF2", CHRF())
