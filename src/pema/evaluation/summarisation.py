"""ROUGE-1, ROUGE-2 and ROUGE-L (Lin 2004): F-measure, without stemming.

On ASCII text the values equal those of the `rouge-score` package with `use_stemmer=False`, which needs NLTK and drops
all letters outside a to z. Here a word is a run of letters and digits of any script with their combining marks, in
composed letters (NFC); in a script written without spaces (Chinese, Japanese, Thai, Lao, Khmer, Burmese) each character
with its marks is a word.
"""

from __future__ import annotations

from collections import Counter

from pema.evaluation.mean import Mean
from pema.tasks.characters import words


def rouge(kind: str) -> Mean:
    """Build the metric `rouge1`, `rouge2` or `rougeL`, 0 to 100."""
    segment = {"rouge1": rouge_1, "rouge2": rouge_2, "rougeL": rouge_l}[kind]
    return Mean(segment, f"{kind}|measure:f1|case:lc|tok:words,unspaced:chars|stem:no", 100.0)


def rouge_1(hypothesis: str, reference: str) -> float:
    """Return the F-measure of shared words, 0 to 1."""
    return _rouge_n(hypothesis, reference, 1)


def rouge_2(hypothesis: str, reference: str) -> float:
    """Return the F-measure of shared pairs of adjacent words, 0 to 1."""
    return _rouge_n(hypothesis, reference, 2)


def rouge_l(hypothesis: str, reference: str) -> float:
    """Return the F-measure of the longest common subsequence of words, 0 to 1."""
    left, right = _words(hypothesis), _words(reference)
    return f_measure(longest_common_subsequence(left, right), len(left), len(right))


def longest_common_subsequence(left: list[str], right: list[str]) -> int:
    """Return the length of the longest common subsequence; each row of the table is the bits of one integer.

    Bit i of `row` is 0 where the length grows at left[i] (Hyyrö 2004).
    """
    where: dict[str, int] = {}
    for i, word in enumerate(left):
        where[word] = where.get(word, 0) | 1 << i
    full = (1 << len(left)) - 1
    row = full
    for word in right:
        matched = row & where.get(word, 0)
        row = (row + matched | row - matched) & full
    return len(left) - row.bit_count()


def f_measure(shared: int, left: int, right: int) -> float:
    """Return the harmonic mean of shared / left and shared / right; 0 where nothing is shared."""
    return 2 * shared / (left + right) if shared else 0.0


def _rouge_n(hypothesis: str, reference: str, n: int) -> float:
    left, right = _grams(_words(hypothesis), n), _grams(_words(reference), n)
    return f_measure((left & right).total(), left.total(), right.total())


def _grams(words: list[str], n: int) -> Counter[tuple[str, ...]]:
    return Counter(zip(*(words[i:] for i in range(n)), strict=False))


def _words(text: str) -> list[str]:
    return words(text.lower())
