"""Dropout whose mask depends only on the seed and the step, so that a resumed run draws the same masks."""

from __future__ import annotations

import torch
from torch import Tensor

LEVELS = 1 << 16


class Dropout:
    """Dropout: x -> x m / (1 - p), with m = 0 at a share p of the entries (p rounded to a multiple of 1 / 65536).

    Each 64-bit random number serves four entries, which on a CPU is many times faster than a random number per entry.
    """

    def __init__(self, p: float, seed: int, device: torch.device) -> None:
        self.cut = min(round(p * LEVELS), LEVELS - 1)
        self.seed = seed
        self.random = torch.Generator(device)

    def at(self, step: int) -> Dropout | None:
        """Prepare the masks of `step`; return None if nothing is dropped."""
        if not self.cut:
            return None
        self.random.manual_seed((self.seed * 0x9E3779B97F4A7C15 + step * 0xBF58476D1CE4E5B9) % (1 << 63))
        return self

    def __call__(self, x: Tensor) -> Tensor:
        """Drop entries of x, any shape."""
        words = torch.empty((x.numel() + 3) // 4, dtype=torch.int64, device=x.device)
        words.random_(-(1 << 63), None, generator=self.random)
        draws = words.view(torch.int16)[: x.numel()].view(x.shape)
        return x * (draws >= self.cut - LEVELS // 2) * (LEVELS / (LEVELS - self.cut))
