"""Retrieval of the training examples whose sources are most similar to a source: BM25 on character n-grams.

BM25 (Robertson and Zaragoza 2009) with k1 = 1.2 and b = 0.75 scores the n-grams of 4 characters, word boundaries
included, that a text shares with the query; in scripts written without spaces those of 2 characters. It needs no model
and no words of a language, and finds inflected forms.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import numpy as np

from pema.tasks.characters import are_unspaced, canonical

K1, B = 1.2, 0.75
SPACED, UNSPACED = 4, 2
"""Characters per n-gram, by the kind of script of most letters."""


class Index:
    """Inverted index of texts, with the weight of each n-gram in each text."""

    def __init__(self, texts: Sequence[str]) -> None:
        """Index the texts."""
        self._n = UNSPACED if are_unspaced(texts) else SPACED
        self._size = len(texts)
        counts = [Counter(_grams(text, self._n)) for text in texts]
        lengths = np.array([each.total() for each in counts], np.float64)
        relative = K1 * (1 - B + B * lengths / max(1.0, lengths.mean()))
        places: dict[str, list[int]] = {}
        times: dict[str, list[int]] = {}
        for i, each in enumerate(counts):
            for gram, count in each.items():
                places.setdefault(gram, []).append(i)
                times.setdefault(gram, []).append(count)
        self._postings = {}
        for gram, where in places.items():
            rarity = math.log(1 + (self._size - len(where) + 0.5) / (len(where) + 0.5))
            tf = np.array(times[gram], np.float64)
            self._postings[gram] = np.array(where), rarity * tf * (K1 + 1) / (tf + relative[where])

    def scores(self, query: str) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
        """Return the BM25 score of each text, (n,); an n-gram that the query repeats counts once."""
        scores = np.zeros(self._size)
        for gram in set(_grams(query, self._n)):
            if gram in self._postings:
                where, weights = self._postings[gram]
                scores[where] += weights
        return scores

    def nearest(self, query: str, k: int) -> list[int]:
        """Return the k texts of highest score, the highest first; of equal ones the earlier."""
        return [int(i) for i in np.argsort(-self.scores(query), kind="stable")[:k]]


def _grams(text: str, n: int) -> list[str]:
    folded = f" {' '.join(canonical(text).lower().split())} "
    return [folded[i : i + n] for i in range(max(1, len(folded) - n + 1))]
