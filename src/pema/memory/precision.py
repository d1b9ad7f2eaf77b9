"""The cost of storage in fewer bits, measured on a sample of the pairs while a memory is built."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pema.errors import ConfigError
from pema.memory.config import Dtype
from pema.owner.head import Head

MOST = 0.01
"""Maximum relative increase of the PLM's perplexity when it is computed from the stored representations."""

FIRST, FURTHER = 256, 32
"""Number of pairs measured in the first shard of a build, and in each later one."""

AT_ONCE = 64


class StorageLoss:
    """A measurement of how much worse the PLM predicts from stored representations than from the original ones.

    Attributes:
        pairs: number of pairs measured.
    """

    def __init__(self, head: Head, dtype: Dtype) -> None:
        """Prepare to measure the loss of storage in `dtype`, with the PLM's head."""
        self.pairs = 0
        self._head, self._dtype = head, dtype
        self._gold = self._squares = self._expected = 0.0

    def sample(self, places: Tensor) -> Tensor:
        """Return those of a shard's pairs (n,) that are measured, evenly spaced: all that `add` needs to be given."""
        count = min(FURTHER if self.pairs else FIRST, len(places))
        return places[torch.linspace(0, len(places) - 1, count).round().long()]

    @torch.no_grad()
    def add(self, f: Tensor, stored: Tensor, targets: Tensor) -> None:
        """Measure a sample of a shard's pairs, evenly spaced.

        Args:
            f: (n, d_tap), as computed by the PLM.
            stored: (n, d_tap) float32, restored from storage.
            targets: (n,) int64.

        Raises:
            ConfigError: the perplexity rises by more than `MOST` over all pairs measured so far.
        """
        if torch.promote_types(f.dtype, getattr(torch, self._dtype)) == getattr(torch, self._dtype):
            return  # the dtype represents every value of the PLM's dtype exactly
        chosen = self.sample(torch.arange(len(f)))
        for rows in torch.split(chosen, AT_ONCE):
            exact, read = (self._log_p(each[rows]) for each in (f.float(), stored))
            difference = exact - read
            gold = difference.gather(1, targets[rows].to(difference.device)[:, None])[:, 0].double()
            self._gold += float(gold.sum())
            self._squares += float(gold.square().sum())
            self._expected += float((exact.exp() * difference).sum(dtype=torch.float64))
        self.pairs += len(chosen)
        rise = self.rise
        if not rise <= MOST:
            wider = "float16, bfloat16 or float32" if self._dtype == "int8" else "float32"
            raise ConfigError(
                f"dtype={self._dtype!r} loses too much precision for these representations: on {self.pairs} stored "
                f"pairs the PLM's perplexity rises by {rise:.1%}, more than {MOST:.0%}. Build with dtype {wider}."
            )

    @property
    def rise(self) -> float:
        """Return the relative increase of perplexity: the larger of the PLM's own expectation and the stored targets.

        The first is exp(mean KL(P || P_stored)) - 1. The second is reduced by twice the standard error, so that it
        counts only if significant: a few targets may become less likely by chance while others become more likely.
        """
        n = max(self.pairs, 1)
        mean = self._gold / n
        error = math.sqrt(max(self._squares / n - mean * mean, 0.0) / n) if n > 1 else math.inf
        return math.expm1(min(max(self._expected / n, mean - 2 * error), 700.0))

    def _log_p(self, f: Tensor) -> Tensor:
        """Return log P(. | c): (b, d_tap) -> (b, V)."""
        return torch.log_softmax(self._head(f.to(self._head.weight.device)), dim=-1)
