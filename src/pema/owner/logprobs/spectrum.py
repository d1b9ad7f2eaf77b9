"""The spectrum of centred log-probabilities, which shows the width d of a representation.

With logits W f, the log-probabilities of a context are W f - c, and minus their mean over all tokens (W - mean) f:
vectors in a space of d dimensions. n > d of them have d singular values from the model, and n - d from rounding. These
are nearly equal, and much smaller: the gap.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

SURE = 10.0
"""A gap of this size ends the requests; a smaller one can be widened by more of them."""

LEAST = 1.5
"""Smallest gap that is accepted."""

_TAIL = (8, 20)
"""Minimum number of singular values after the gap: an absolute one, and one in this many."""

_FIRST = 8
"""Number of leading singular values between which gaps are not searched: the mean of all contexts is one of them."""

_FLAT = 3.0
"""Largest ratio of the first to the last singular value after a gap, unless the gap is larger."""

_FLOOR = 3e-8
"""Smallest singular value, as a share of the largest, that the products in float64 resolve."""

BLOCK = 8192
"""Number of tokens processed at a time."""

Columns = Callable[[int, int], Tensor]
"""Returns centred log-probabilities of the tokens from one to another, (n, k) float64."""


def widest(n: int) -> int:
    """Return the largest d whose gap n contexts can show."""
    return n - max(_TAIL[0], -(-n // _TAIL[1]))


@dataclass(frozen=True)
class Spectrum:
    """The singular values of n contexts and their singular vectors.

    Attributes:
        values: (n,) float64, in descending order.
        vectors: (n, n) float64, column i belongs to values[i].
        V: number of tokens; of more contexts than that, V - 1 values are not zero whatever the model.
    """

    values: Tensor
    vectors: Tensor
    V: int

    @classmethod
    def of(cls, columns: Columns, n: int, V: int) -> Spectrum:
        """Compute the spectrum of (n, V) log-probabilities, a block of tokens at a time."""
        products = torch.zeros(n, n, dtype=torch.float64)
        for start in range(0, V, BLOCK):
            block = columns(start, min(start + BLOCK, V))
            products.addmm_(block, block.T)
        squares, vectors = torch.linalg.eigh(products)
        values = squares.flip(0).clamp_min(0.0).sqrt()
        return cls(values.clamp_min(_FLOOR * float(values[0])), vectors.flip(1), V)

    def gap(self) -> tuple[int, float]:
        """Return the number of singular values in front of the largest gap, and its ratio; (0, 1.0) if there is none.

        What follows a gap is flat: otherwise values of the model follow.
        """
        last = min(widest(len(self.values)), self.V // 2)
        after = self.values[_FIRST + 1 : last + 1]
        ratios = self.values[_FIRST:last] / after
        ratios[after / self.values[-1] > ratios.clamp_min(_FLAT)] = 1.0
        if len(ratios) == 0 or float(ratios.max()) == 1.0:
            return 0, 1.0
        place = int(ratios.argmax())
        return _FIRST + place + 1, float(ratios[place])


def bend(columns: Columns, spectrum: Spectrum, d: int, V: int) -> float:
    """Return how much of what d dimensions leave over is a curve of the logits, as a soft cap makes it: 0 to 1.

    cap * tanh(x / cap) is x - x^3 / (3 cap^2) + ...: the remainder correlates with squares and cubes of the logits.
    Rounding does not.
    """
    block = columns(0, min(V, BLOCK // 2))
    kept = spectrum.vectors[:, :d]

    def remainder(values: Tensor) -> Tensor:
        values = values - values.mean(dim=1, keepdim=True)
        return (values - kept @ (kept.T @ values)).flatten()

    rest = remainder(block)
    curves = torch.stack([remainder(block.square()), remainder(block**3)], dim=1)
    solution = torch.linalg.lstsq(curves, rest[:, None]).solution
    if float(solution[1]) >= 0:  # no cap: values of the model beyond d dimensions
        return 0.0
    fitted = curves @ solution
    return float(fitted.square().sum() / rest.square().sum().clamp_min(torch.finfo(torch.float64).tiny))
