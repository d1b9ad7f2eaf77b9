"""What storage in fewer bits costs, measured on some of the pairs while a memory is built."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pema.errors import ConfigError
from pema.memory.config import Dtype
from pema.owner.head import Head

MOST = 0.01
"""The PLM's perplexity may rise by this share, as read from the stored representations."""

FIRST, FURTHER = 256, 32
"""Pairs that are measured of the first shard of a build, and of each further one."""

AT_ONCE = 64


class StorageLoss:
    """How much worse the PLM predicts from stored representations than from those that it handed out.

    Attributes:
        pairs: how many were measured.
    """

    def __init__(self, head: Head, dtype: Dtype) -> None:
        """Measure with this head what `dtype` loses."""
        self.pairs = 0
        self._head, self._dtype = head, dtype
        self._gold = self._squares = self._expected = 0.0

    @torch.no_grad()
    def add(self, f: Tensor, stored: Tensor, targets: Tensor) -> None:
        """Measure some pairs of a shard, evenly spread.

        Args:
            f: (n, d_tap), as the PLM handed them out.
            stored: (n, d_tap) float32, what stands for them.
            targets: (n,) int64.

        Raises:
            ConfigError: the perplexity rises by more than `MOST` over all that were measured.
        """
        if torch.promote_types(f.dtype, getattr(torch, self._dtype)) == getattr(torch, self._dtype):
            return  # the dtype holds every value of the PLM's own
        count = min(FURTHER if self.pairs else FIRST, len(f))
        for rows in torch.split(torch.linspace(0, len(f) - 1, count).round().long(), AT_ONCE):
            exact, read = (self._log_p(each[rows]) for each in (f.float(), stored))
            difference = exact - read
            gold = difference.gather(1, targets[rows].to(difference.device)[:, None])[:, 0].double()
            self._gold += float(gold.sum())
            self._squares += float(gold.square().sum())
            self._expected += float((exact.exp() * difference).sum(dtype=torch.float64))
        self.pairs += count
        rise = self.rise
        if not rise <= MOST:
            wider = "float16, bfloat16 or float32" if self._dtype == "int8" else "float32"
            raise ConfigError(
                f"dtype={self._dtype!r} loses too much of these representations: from {self.pairs} stored pairs the "
                f"PLM's perplexity rises by {rise:.1%}, more than {MOST:.0%}. Build with dtype {wider}."
            )

    @property
    def rise(self) -> float:
        """The share by which the perplexity rises: of the tokens that the PLM expects, or of the stored targets.

        The first is exp(mean KL(P || P_stored)) - 1. The second counts as far as it is no chance: a few targets may
        become less likely because others became likelier, so twice the standard error is taken off.
        """
        n = max(self.pairs, 1)
        mean = self._gold / n
        error = math.sqrt(max(self._squares / n - mean * mean, 0.0) / n) if n > 1 else math.inf
        return math.expm1(min(max(self._expected / n, mean - 2 * error), 700.0))

    def _log_p(self, f: Tensor) -> Tensor:
        """(b, d_tap) -> (b, V) log P(. | c)."""
        return torch.log_softmax(self._head(f.to(self._head.weight.device)), dim=-1)
