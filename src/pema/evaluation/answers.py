"""Exact match and F1 of answers, as the SQuAD scorer computes them (Rajpurkar et al. 2016)."""

from __future__ import annotations

import re
import string
from collections import Counter

from pema.evaluation.mean import Mean
from pema.evaluation.summarisation import f_measure

ARTICLES = re.compile(r"\b(a|an|the)\b")
PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalise_answer(text: str) -> str:
    """Lower case, without punctuation, English articles and extra spaces."""
    return " ".join(ARTICLES.sub(" ", text.lower().translate(PUNCTUATION)).split())


def matches_exactly(hypothesis: str, reference: str) -> float:
    """1 where both are equal after normalisation, else 0."""
    return float(normalise_answer(hypothesis) == normalise_answer(reference))


def word_f1(hypothesis: str, reference: str) -> float:
    """F-measure of shared words, 0 to 1; two answers without words are equal, as in SQuAD 2."""
    left, right = normalise_answer(hypothesis).split(), normalise_answer(reference).split()
    if not left or not right:
        return float(left == right)
    return f_measure((Counter(left) & Counter(right)).total(), len(left), len(right))


def exact_match() -> Mean:
    """Share of answers that match exactly, 0 to 100."""
    return Mean(matches_exactly, "exact_match|norm:squad", 100.0)


def f1() -> Mean:
    """Mean word F1, 0 to 100."""
    return Mean(word_f1, "f1|norm:squad", 100.0)
