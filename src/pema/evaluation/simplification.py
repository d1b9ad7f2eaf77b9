"""SARI (Xu et al. 2016), 0 to 100: simplifications compared with their source and all references.

Computed as by the authors' script, for n-grams of n = 1 to 4 words: the F-measure of the words that a text adds, the
F-measure of those that it keeps, and the precision of those that it deletes, averaged over n and over the three; the
score of a corpus is the mean over its texts. Texts are lowercased and split by sacreBLEU's tokenizer 13a. (EASSE sums
its counts over the corpus before it divides, and uses an F-measure for deletions too: its values differ.)
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a

from pema.errors import ConfigError
from pema.evaluation.score import Array, Reference, all_valid, references_part, require_aligned

ORDER = 4


class Sari:
    """Mean SARI of the texts, 0 to 100."""

    def __init__(self, sources: Sequence[str] | None) -> None:
        """Set the sources.

        Raises:
            ConfigError: there are none.
        """
        if sources is None:
            raise ConfigError("sari compares texts with their sources: give the sources.")
        self._sources = sources

    def statistics(self, hypotheses: Sequence[str], references: Sequence[Reference]) -> Array:
        """Return (n, 3): SARI of each text, 1 as its count, and the number of its references."""
        require_aligned(hypotheses=hypotheses, sources=self._sources)
        split = Tokenizer13a()

        def words(text: str) -> list[str]:
            return str(split(text.lower())).split()

        return np.array(
            [
                (sari_of(words(source), words(text), [words(each) for each in gold]), 1.0, len(gold))
                for source, text, gold in zip(self._sources, hypotheses, all_valid(references), strict=True)
            ],
            np.float64,
        )

    def value(self, totals: Array) -> float:
        """Return the mean over the texts, in percent."""
        return float(100 * totals[0] / totals[1])

    def signature(self, totals: Array) -> str:
        """Return the tokenizer, the number of texts, and that of references if there are more."""
        return f"SARI|case:lc|tok:13a|mean:texts|n:{int(totals[1])}{references_part(totals[1], totals[2])}|scale:100"


def sari_of(source: Sequence[str], hypothesis: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Return SARI of one text, 0 to 1; a measure without any n-gram is 0."""
    added = kept = deleted = 0.0
    for n in range(1, ORDER + 1):
        count = len(references)
        before, after = (_grams(text, n, count) for text in (source, hypothesis))
        gold: Counter[tuple[str, ...]] = sum((_grams(text, n) for text in references), Counter())
        new = after.keys() - before.keys()
        right, wanted = new & gold.keys(), gold.keys() - before.keys()
        added += _f(_ratio(len(right), len(new)), _ratio(len(right), len(wanted)))
        keeps, should_keep = before & after, before & gold
        both = keeps & gold
        kept += _f(_mean_ratio(both, keeps), _mean_ratio(both, should_keep))
        deletes = before - after
        deleted += _mean_ratio(deletes - gold, deletes)
    return (added + kept + deleted) / (3 * ORDER)


def _grams(text: Sequence[str], n: int, times: int = 1) -> Counter[tuple[str, ...]]:
    """Count n-grams, each `times` times: a source is compared with the sum of all references."""
    counts = Counter(zip(*(text[i:] for i in range(n)), strict=False))
    return Counter({gram: count * times for gram, count in counts.items()})


def _mean_ratio(part: Mapping[tuple[str, ...], int], whole: Mapping[tuple[str, ...], int]) -> float:
    """Return the mean of part / whole over the n-grams of `whole`."""
    return _ratio(sum(part[gram] / whole[gram] for gram in part), len(whole))


def _f(precision: float, recall: float) -> float:
    return _ratio(2 * precision * recall, precision + recall)


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else 0.0
