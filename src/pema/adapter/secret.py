"""Random numbers for differential privacy: unpredictable for others, reproducible with the key."""

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
    """A key of 256 bits; random numbers are SHAKE-256 of the key, the step and their purpose.

    `torch.Generator` uses 32 bits of its seed on a CPU, few enough for an exhaustive search, and its numbers reveal its
    state; a hash has neither weakness. Whoever has the key can remove the noise.
    """

    key: bytes

    @classmethod
    def draw(cls) -> Secret:
        """Draw a new key from the system's random number generator."""
        return cls(secrets.token_bytes(KEY_BYTES))

    def poisson_sample(self, step: int, examples: int, rate: float) -> Integers:
        """Draw the batch of `step`: sorted indices of examples, each included independently with probability `rate`."""
        return np.flatnonzero(self._uniform(step, "sample", examples) < rate)

    def normal(self, step: int, name: str, shape: Sequence[int]) -> Tensor:
        """Draw independent standard normal numbers for the parameter `name`, float64, by Box and Muller."""
        n = int(np.prod(shape))
        half = (n + 1) // 2
        uniform = self._uniform(step, name, 2 * half)
        radius = np.sqrt(-2 * np.log1p(-uniform[:half]))
        angle = 2 * np.pi * uniform[half:]
        normal = np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])[:n]
        return torch.from_numpy(normal).view(*shape)

    def _uniform(self, step: int, purpose: str, n: int) -> np.ndarray:
        """Draw uniform numbers in [0, 1), multiples of 2^-53: (n,) float64."""
        stream = hashlib.shake_256(self.key + f"{purpose} {step}".encode()).digest(8 * n)
        uniform: np.ndarray = (np.frombuffer(stream, "<u8") >> 11) * 2.0**-53
        return uniform
