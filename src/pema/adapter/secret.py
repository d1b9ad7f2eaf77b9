"""The randomness that differential privacy rests on: unpredictable to others, the same again for who holds the key."""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pema.memory.shard import Integers

KEY_BYTES = 32


@dataclass(frozen=True)
class Secret:
    """A key of 256 bits; draws are SHAKE-256 of the key, the step and what they are for.

    `torch.Generator` takes 32 bits of its seed on a CPU, few enough to try them all out, and its numbers give its state
    away; so the draws come from a hash. Whoever has the key can take the noise off again.
    """

    key: bytes

    @classmethod
    def draw(cls) -> Secret:
        """A new key from the system's randomness."""
        return cls(secrets.token_bytes(KEY_BYTES))

    def poisson_sample(self, step: int, examples: int, rate: float) -> Integers:
        """Numbers of the examples in the batch of `step`, rising: each is in it with probability `rate`, alone."""
        return np.flatnonzero(self._uniform(step, "sample", examples) < rate)

    def normal(self, step: int, name: str, shape: Sequence[int]) -> Tensor:
        """Independent standard normal numbers for the parameter `name`, float64, by Box and Muller."""
        n = int(np.prod(shape))
        half = (n + 1) // 2
        uniform = self._uniform(step, name, 2 * half)
        radius = np.sqrt(-2 * np.log1p(-uniform[:half]))
        angle = 2 * np.pi * uniform[half:]
        normal = np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])[:n]
        return torch.from_numpy(normal).view(*shape)

    def _uniform(self, step: int, purpose: str, n: int) -> np.ndarray:
        """(n,) float64 in [0, 1), multiples of 2^-53."""
        stream = hashlib.shake_256(self.key + f"{purpose} {step}".encode()).digest(8 * n)
        uniform: np.ndarray = (np.frombuffer(stream, "<u8") >> 11) * 2.0**-53
        return uniform
