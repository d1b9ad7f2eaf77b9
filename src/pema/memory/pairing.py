"""Pairing of contexts with gold tokens."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from pema.memory.config import Targets

Tokens = npt.NDArray[np.int64]

NO_TARGET = -1
"""In place of the gold token of a `matched` context that has none."""

MATCH = 5
"""Weight of a token of the common subsequence, in tokens of the gold prefix."""


def pair(target: Sequence[int], generated: Sequence[int] | None, targets: Targets) -> Tokens:
    """Return the gold tokens paired with an example's contexts, one per context.

    The first m contexts are kept; those beyond the result have no target and are dropped.

    Args:
        target: (n,) gold tokens y_1 .. y_n, the last one an end of sequence.
        generated: the token generated after each `predicted` context; None for `teacher` contexts.
        targets: "position" pairs context i with y_i, up to the end of the shorter of generated text and target.
            "aligned" pairs it with the gold token that follows the gold prefix nearest to the generated prefix.
            "matched" pairs it with the gold token after the match of the last generated token, if that has one.

    Returns:
        (m,) tokens, where m = n for `teacher`, min(n, len(generated)) for "position", else len(generated); `NO_TARGET`
        for contexts without one.
    """
    gold = np.asarray(target, np.int64)
    if generated is None:
        return gold
    if targets == "position":
        return gold[: len(generated)]
    text = np.asarray(generated, np.int64)
    if targets == "aligned":
        return gold[align(text, gold)]
    places = match(text, gold)
    return np.where(places < 0, NO_TARGET, gold[places])


def agreeing(target: Sequence[int], generated: Sequence[int]) -> int:
    """Return the number of contexts that the PLM continued with the next token of the gold text.

    That is the number of i with generated[i] = gold[j], where gold[:j] is the gold prefix nearest to generated[:i].
    """
    text, gold = np.asarray(generated, np.int64), np.asarray(target, np.int64)
    return int((gold[align(text, gold)] == text).sum())


def align(generated: Tokens, gold: Tokens) -> Tokens:
    """Return for every i the j < len(gold) that minimises the edit distance between generated[:i] and gold[:j].

    This is the dynamic oracle of imitation learning: gold[j] is the best continuation of the text generated so far.
    Ties are resolved to the largest j, so that a gold token skipped by the PLM is not requested again after its
    successor.

    One table D[i, j] is computed per call, row by row:
    D[i, j] = min(D[i-1, j] + 1, D[i-1, j-1] + [differ], D[i, j-1] + 1); the last term is a running minimum of
    (the other terms - j).

    Args:
        generated: (m,); the last token is not part of any prefix.
        gold: (n,), n >= 1.

    Returns:
        (m,) int64 indices into `gold`.
    """
    n = len(gold)
    columns = np.arange(n)
    differ = generated[:, None] != gold[None, : n - 1]
    nearest = np.empty(len(generated), np.int64)
    row = columns
    for i in range(len(generated)):
        if i > 0:
            best = row + 1
            np.minimum(best[1:], row[:-1] + differ[i - 1], out=best[1:])
            row = np.minimum.accumulate(best - columns) + columns
        nearest[i] = n - 1 - int(np.argmin(row[::-1]))
    return nearest


def match(generated: Tokens, gold: Tokens) -> Tokens:
    """Return for every i the j < len(gold) at which the text goes on: gold[j - 1] is matched by generated[i - 1].

    The score of a gold prefix is `MATCH` LCS(generated[:i], gold[:j]) - j, where LCS is the length of the longest
    common subsequence: gold tokens may be skipped if the text says what follows them. A context has a target if the
    highest score, over all j, is reached by a subsequence that ends with the last token of both prefixes; of several
    the shortest prefix counts. The first context, the prompt, has the first gold token.

    Args:
        generated: (m,), m >= 1; the last token is not part of any prefix.
        gold: (n,), n >= 1.

    Returns:
        (m,) int64 indices into `gold`; -1 for contexts without a target.
    """
    n = len(gold)
    columns = np.arange(n)
    lcs = np.zeros(n, np.int64)
    places = np.full(len(generated), -1)
    places[0] = 0
    for i in range(1, len(generated)):
        # LCS of both prefixes if their last tokens are a pair of it; 0 if these differ.
        ending = np.concatenate(([0], (lcs[:-1] + 1) * (gold[: n - 1] == generated[i - 1])))
        lcs = np.maximum.accumulate(np.maximum(lcs, ending))
        scores = np.where(ending > 0, MATCH * ending - columns, -n)
        j = int(np.argmax(scores))
        if ending[j] > 0 and scores[j] == (MATCH * lcs - columns).max():
            places[i] = j
    return places
