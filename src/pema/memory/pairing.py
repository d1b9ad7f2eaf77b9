"""Pairing of contexts with gold tokens."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from pema.memory.config import Targets

Tokens = npt.NDArray[np.int64]


def pair(target: Sequence[int], generated: Sequence[int] | None, targets: Targets) -> Tokens:
    """Return the gold tokens paired with an example's contexts, one per context.

    The first m contexts are kept; those beyond the result have no target and are dropped.

    Args:
        target: (n,) gold tokens y_1 .. y_n, the last one an end of sequence.
        generated: the token generated after each `predicted` context; None for `teacher` contexts.
        targets: "position" pairs context i with y_i, up to the end of the shorter of generated text and target.
            "aligned" pairs it with the gold token that follows the gold prefix nearest to the generated prefix.

    Returns:
        (m,) tokens, where m = n for `teacher`, min(n, len(generated)) for "position", len(generated) for "aligned".
    """
    gold = np.asarray(target, np.int64)
    if generated is None:
        return gold
    if targets == "position":
        return gold[: len(generated)]
    return gold[align(np.asarray(generated, np.int64), gold)]


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
