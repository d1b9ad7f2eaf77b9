"""Dropout whose mask depends on the seed and the step alone, so a resumed run draws what an unbroken one would."""

from __future__ import annotations

import torch
from torch import Tensor

LEVELS = 1 << 16


class Dropout:
    """x -> x m / (1 - p), with m = 0 at a share p of the entries (p rounded to a multiple of 1 / 65536).

    Four 16-bit draws come out of each 64-bit random number, which on a CPU is many times faster than a draw of each
    entry.
    """

    def __init__(self, p: float, seed: int, device: torch.device) -> None:
        self.cut = min(round(p * LEVELS), LEVELS - 1)
        self.seed = seed
        self.random = torch.Generator(device)

    def at(self, step: int) -> Dropout | None:
        """Make ready for the masks of `step`; None where nothing is dropped."""
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
