"""Dropout whose mask depends only on the seed and the step, so that a resumed run draws the same masks."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

LEVELS = 1 << 16


class Dropout:
    """Dropout: x -> x m / (1 - p), with m = 0 at a share p of the entries (p rounded to a multiple of 1 / 65536).

    Each 64-bit random number serves four entries, which on a CPU is many times faster than a random number per entry.

    Of several processes each draws the masks of the whole batch and takes those of its pairs, so that they do not
    depend on the number of processes.
    """

    def __init__(self, p: float, seed: int, device: torch.device) -> None:
        self.cut = min(round(p * LEVELS), LEVELS - 1)
        self.seed = seed
        self.random = torch.Generator(device)
        self.first, self.pairs = 0, 0

    def at(self, step: int, first: int = 0, pairs: int = 0) -> Dropout | None:
        """Prepare the masks of `step`; return None if nothing is dropped.

        Args:
            step: the step.
            first: place of this process's first pair in the batch.
            pairs: number of pairs of the batch, if this process has only a part of them; else 0.
        """
        if not self.cut:
            return None
        self.first, self.pairs = first, pairs
        self.random.manual_seed((self.seed * 0x9E3779B97F4A7C15 + step * 0xBF58476D1CE4E5B9) % (1 << 63))
        return self

    def __call__(self, x: Tensor) -> Tensor:
        """Drop entries of x, any shape, whose rows are this process's pairs."""
        if not self.pairs:
            return self.common(x)
        draws = self._draws((self.pairs, *x.shape[1:]), x.device)[self.own(len(x))]
        return x * (draws >= self.cut - LEVELS // 2) * (LEVELS / (LEVELS - self.cut))

    def common(self, x: Tensor) -> Tensor:
        """Drop entries of x, any shape, which is equal in all processes."""
        draws = self._draws(x.shape, x.device)
        return x * (draws >= self.cut - LEVELS // 2) * (LEVELS / (LEVELS - self.cut))

    def own(self, n: int) -> slice:
        """Return the place of this process's n pairs in the batch."""
        return slice(self.first, self.first + n)

    def _draws(self, shape: Sequence[int], device: torch.device) -> Tensor:
        """Draw an int16 for each entry of a tensor."""
        n = math.prod(shape)
        words = torch.empty((n + 3) // 4, dtype=torch.int64, device=device)
        words.random_(-(1 << 63), None, generator=self.random)
        return words.view(torch.int16)[:n].view(shape)
