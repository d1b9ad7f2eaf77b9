"""Accuracy of labels."""

from __future__ import annotations

import string
import unicodedata

from pema.evaluation.mean import Mean

AROUND = string.punctuation + string.whitespace


def normalise_label(text: str) -> str:
    """NFKC, case folded, single spaces, without punctuation at the ends: `" Positive."` is `positive`.

    A label that is all punctuation, such as `+`, is kept.
    """
    folded = " ".join(unicodedata.normalize("NFKC", text).casefold().split())
    return folded.strip(AROUND) or folded


def same_label(hypothesis: str, reference: str) -> float:
    """1 where both are the same label after normalisation, else 0."""
    return float(normalise_label(hypothesis) == normalise_label(reference))


def accuracy() -> Mean:
    """Share of hypotheses that are the reference label, 0 to 1."""
    return Mean(same_label, "accuracy|norm:nfkc,casefold,ends", 1.0)
