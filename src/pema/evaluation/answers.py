r"""Exact match and F1 of answers, normalised as the SQuAD scorer does (Rajpurkar et al. 2016), with two differences.

The SQuAD scorer drops case, ASCII punctuation and the words a, an and the, which makes different answers equal. Here
composed and decomposed letters are equal (NFC), and the following are kept:

- symbols (`# $ % & * + < = > @ \ ^ | ~`), a sign before a number, and separators between two digits except for
  thousands: "C++" differs from "C", "-1" from "1" and "1.5" from "15", but "1,000" equals "1000";
- an article that is not followed by a word: "vitamin A" differs from "vitamin", and "A" is an answer;
- an answer that consists of punctuation only.
"""

from __future__ import annotations

import re
from collections import Counter

from pema.evaluation.mean import Mean
from pema.evaluation.summarisation import f_measure
from pema.tasks.characters import canonical, tokens

ARTICLE = re.compile(r"(?<![\w'’-])(?:a|an|the)\s+(?=\S)")
PUNCTUATION = re.compile(
    r"[!\"'()?;\[\]_`{}]"
    r"|\.(?!\d)"
    r"|(?<!\d)[,:/]|[,:/](?!\d)|(?<=\d),(?=\d{3}(?!\d))"
    r"|(?<=[^\W\d_])-|-(?!\.?\d)"
)


def normalise_answer(text: str) -> str:
    """Lowercase an answer; remove punctuation, English articles and extra spaces, with the exceptions listed above."""
    folded = " ".join(canonical(text).lower().split())
    return " ".join(PUNCTUATION.sub("", ARTICLE.sub("", folded)).split()) or folded


def matches_exactly(hypothesis: str, reference: str) -> float:
    """Return 1 where both are equal after normalisation, else 0."""
    return float(normalise_answer(hypothesis) == normalise_answer(reference))


def word_f1(hypothesis: str, reference: str) -> float:
    """Return the F-measure of shared words, 0 to 1; two answers without words are equal, as in SQuAD 2.

    In scripts written without spaces each character is a word.
    """
    left, right = tokens(normalise_answer(hypothesis)), tokens(normalise_answer(reference))
    if not left or not right:
        return float(left == right)
    return f_measure((Counter(left) & Counter(right)).total(), len(left), len(right))


def matches_verbatim(hypothesis: str, reference: str) -> float:
    """Return 1 where both are equal, apart from the amount of white space, else 0."""
    return float(canonical(hypothesis).split() == canonical(reference).split())


def verbatim_match() -> Mean:
    """Build the metric: percentage of texts that equal the reference, case included; for commands and code."""
    return Mean(matches_verbatim, "verbatim_match|norm:nfc,width,spaces", 100.0)


def exact_match() -> Mean:
    """Build the metric: percentage of answers that match exactly, 0 to 100."""
    return Mean(matches_exactly, "exact_match|norm:squad,symbols", 100.0)


def f1() -> Mean:
    """Build the metric: mean word F1, 0 to 100."""
    return Mean(word_f1, "f1|norm:squad,symbols|tok:spaces,unspaced:chars", 100.0)
