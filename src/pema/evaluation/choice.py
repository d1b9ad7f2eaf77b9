"""The order of scores when a setting is chosen on dev examples by the texts that are generated with it."""

from __future__ import annotations

import math

from pema.evaluation.notation import notation

TEXTS = 100
"""Default maximum number of dev examples for which a candidate generates a text."""


def rank(metric: str, score: float | None) -> float:
    """Return the place of a score: the lowest is the best, and infinity that of an undefined score (None)."""
    if score is None:
        return math.inf
    return score if notation(metric).lower_is_better else -score
