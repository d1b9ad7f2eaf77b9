r"""Exact match and F1 of answers, normalised as the SQuAD scorer does (Rajpurkar et al. 2016), with two differences.

The SQuAD scorer drops case, ASCII punctuation and the words a, an and the, which makes different answers equal. Here
composed and decomposed letters are the same (NFC), and these stay:

- symbols (`# $ % & * + < = > @ \ ^ | ~`), a sign in front of a number and what separates two digits, thousands apart:
  "C++" is not "C", "-1" is not "1", "1.5" is not "15", and "1,000" is "1000";
- an article that no word follows: "vitamin A" is not "vitamin", and "A" is an answer;
- an answer of punctuation alone.
"""

from __future__ import annotations

import re
from collections import Counter

from pema.evaluation.characters import canonical, tokens
from pema.evaluation.mean import Mean
from pema.evaluation.summarisation import f_measure

ARTICLE = re.compile(r"(?<![\w'’-])(?:a|an|the)\s+(?=\S)")
PUNCTUATION = re.compile(
    r"[!\"'()?;\[\]_`{}]"
    r"|\.(?!\d)"
    r"|(?<!\d)[,:/]|[,:/](?!\d)|(?<=\d),(?=\d{3}(?!\d))"
    r"|(?<=[^\W\d_])-|-(?!\.?\d)"
)


def normalise_answer(text: str) -> str:
    """Lower case, without punctuation, English articles and extra spaces; see above for what stays."""
    folded = " ".join(canonical(text).lower().split())
    return " ".join(PUNCTUATION.sub("", ARTICLE.sub("", folded)).split()) or folded


def matches_exactly(hypothesis: str, reference: str) -> float:
    """1 where both are equal after normalisation, else 0."""
    return float(normalise_answer(hypothesis) == normalise_answer(reference))


def word_f1(hypothesis: str, reference: str) -> float:
    """F-measure of shared words, 0 to 1; two answers without words are equal, as in SQuAD 2.

    In scripts that are written without spaces every character is a word.
    """
    left, right = tokens(normalise_answer(hypothesis)), tokens(normalise_answer(reference))
    if not left or not right:
        return float(left == right)
    return f_measure((Counter(left) & Counter(right)).total(), len(left), len(right))


def exact_match() -> Mean:
    """Share of answers that match exactly, 0 to 100."""
    return Mean(matches_exactly, "exact_match|norm:squad,symbols", 100.0)


def f1() -> Mean:
    """Mean word F1, 0 to 100."""
    return Mean(word_f1, "f1|norm:squad,symbols|tok:spaces,unspaced:chars", 100.0)
