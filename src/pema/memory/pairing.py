"""Which gold token each context is paired with."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from pema.memory.config import Targets

Tokens = npt.NDArray[np.int64]


def pair(target: Sequence[int], generated: Sequence[int] | None, targets: Targets) -> Tokens:
    """The gold tokens that an example's contexts are paired with, one for each context that is kept.

    Contexts are kept from the first on; those beyond the result have no target and are cut.

    Args:
        target: (n,) gold tokens y_1 .. y_n, the last one an end of sequence.
        generated: what the PLM generated after each `predicted` context; None for `teacher` contexts.
        targets: "position" pairs context i with y_i, up to the shorter of the PLM's own end and the target's end.
            "aligned" pairs it with the gold token that follows the gold prefix nearest to the generated one.

    Returns:
        (m,) tokens; m = n for `teacher`, min(n, len(generated)) for "position", len(generated) for "aligned".
    """
    gold = np.asarray(target, np.int64)
    if generated is None:
        return gold
    if targets == "position":
        return gold[: len(generated)]
    return gold[align(np.asarray(generated, np.int64), gold)]


def align(generated: Tokens, gold: Tokens) -> Tokens:
    """For every i the j that minimises the edit distance between generated[:i] and gold[:j], with j < len(gold).

    This is the dynamic oracle of imitation learning: gold[j] is where the gold text goes on from what stands there
    already. Of several j with the same distance the largest is taken, so that a gold token the PLM left out is not
    asked for again behind the one that follows it.

    One table D[i, j] a call, a row at a time: D[i, j] = min(D[i-1, j] + 1, D[i-1, j-1] + [differ], D[i, j-1] + 1),
    where the last term is a running minimum of (the others - j).

    Args:
        generated: (m,); the last token is no part of any prefix.
        gold: (n,), n >= 1.

    Returns:
        (m,) indices into `gold`.
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
