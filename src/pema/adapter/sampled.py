"""The cross-entropy of training over a large vocabulary, with a normaliser estimated from a sample."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pema.adapter.config import CORE, SAMPLE
from pema.adapter.loss import CrossEntropy, normalise
from pema.devices import is_asynchronous, move
from pema.owner.head import Head


def frequent(counts: Tensor) -> Tensor:
    """Return the `CORE` most frequent tokens, or all that occur if they are fewer; sorted.

    Args:
        counts: (V,) how often each token is a target.
    """
    seen = int((counts > 0).sum())
    return counts.sort(descending=True, stable=True).indices[: min(seen, CORE)].sort().values


class SampledCrossEntropy(CrossEntropy):
    """Estimate of -log softmax(W_hd h)_y over all V tokens from the frequent ones, y and a sample of the others.

    The normaliser is sum_{core} exp(x_j) + (V - K) / S sum_{sample} exp(x_j), whose mean over the samples is the exact
    one (Jean et al. 2015, "On using very large target vocabulary", section 3, with a uniform sample). The K tokens of
    the core are those that occur in the memory, or the most frequent of them. A target that is not among them has a
    term of its own in its row, and does not count in the sample there, which then stands for the V - K - 1 others. So
    all tokens stay calibrated, although only a part of them has logits in a step.
    """

    def __init__(self, head: Head, core: Tensor, seed: int, *, bfloat16: bool = False, complete: bool = True) -> None:
        """Prepare W_hd for training.

        Args:
            head: the frozen head, with at least `SAMPLE` tokens outside of the core.
            core: (K,) the tokens that are in every step, sorted.
            seed: seed of the samples.
            bfloat16: multiply matrices in bfloat16.
            complete: whether every target is in the core.
        """
        device = head.weight.device
        others = torch.ones(head.vocabulary_size, dtype=torch.bool, device=device)
        others[core] = False
        self.others = others.nonzero()[:, 0]
        self.core, self.seed, self.complete = len(core), seed, complete
        super().__init__(head, torch.cat((core, self.others[:SAMPLE])), bfloat16=bfloat16)
        assert self.position is not None
        self.position[self.others] = -1  # sampled tokens have no fixed position
        self._head_weight, self._head_bias = head.weight.detach(), head.bias
        self._log_weight = math.log(len(self.others) / SAMPLE)
        self._random = torch.Generator()
        self._sample = self.others[:SAMPLE].clone()

    def at(self, step: int) -> SampledCrossEntropy:
        """Draw the sample of `step`; it depends only on the seed and the step."""
        self._random.manual_seed((self.seed * 0x9E3779B97F4A7C15 + step * 0xBF58476D1CE4E5B9 + 1) % (1 << 63))
        drawn = torch.randint(len(self.others), (SAMPLE,), generator=self._random)
        # In place, here and below: a captured step reads them.
        sample = torch.index_select(self.others, 0, move(drawn, self.others.device), out=self._sample)
        # On a CPU `index_select` copies whole rows, ten times faster than indexing.
        self.W_hd[self.core :] = self._head_weight.index_select(0, sample).to(self.W_hd.dtype)
        if self.bias is not None and self._head_bias is not None:
            self.bias[self.core :] = self._head_bias[sample].float() * self.scale
        return self

    def places(self, targets: Tensor) -> Tensor:
        """Return the targets, or the rows of W_hd if all of them have one."""
        return super().places(targets) if self.complete else targets

    def chunk(self, h: Tensor, y: Tensor, dh: Tensor | None) -> Tensor:
        """Return the loss of each row of h (c, d) with targets y (c,); write the gradient of their sum into `dh`."""
        assert self.position is not None
        p = self.logits(h)
        slope = self.slope(p) if dh is not None else None
        p[:, self.core :] += self._log_weight
        places = y if self.complete else self.position[y]
        is_rare = places < 0
        if self.complete:
            rare = places.new_empty(0)
        elif is_asynchronous(places.device):  # which is not waited for to know how many they are
            rare = torch.arange(len(places), device=places.device)
        else:
            rare = is_rare.nonzero()[:, 0]
        column = places.clamp(min=0)[:, None]
        x_y = p.gather(1, column)[:, 0]
        if len(rare):
            own = is_rare[rare]
            rows, x = self._own(h[rare], y[rare])
            x_y[rare] = torch.where(own, x, x_y[rare])
            sampled = p[rare, self.core :]
            p[rare, self.core :] = torch.where(own[:, None], self._without(sampled, y[rare]), sampled)
        log_Z = normalise(p)
        if len(rare):
            whole = torch.logaddexp(log_Z[rare], x.masked_fill(~own, -torch.inf))
            p[rare] *= (log_Z[rare] - whole).exp()[:, None]
            log_Z[rare] = whole
        if dh is not None:
            p.scatter_add_(1, column, -(places >= 0).to(p.dtype)[:, None])
            self.step_back(p if slope is None else p.mul_(slope), dh)
            if len(rare):
                dx = ((x - whole).exp() - 1).masked_fill(~own, 0.0)
                slope = self.slope(x)
                dh.index_add_(0, rare, rows * (dx if slope is None else dx * slope)[:, None])
        return log_Z - x_y

    def _own(self, h: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Return the rows of W_hd of targets outside of the core, and their logits: (m, d) and (m,) float32."""
        rows = self._head_weight.index_select(0, y).to(self.dtype).float()
        x = (h.float() * rows).sum(1) * self.scale
        if self._head_bias is not None:
            x = x + self._head_bias[y].float() * self.scale
        return rows, x if self.soft_cap is None else (x / self.soft_cap).tanh() * self.soft_cap

    def _without(self, logits: Tensor, y: Tensor) -> Tensor:
        """Return the weighted logits of the sample (m, S) as an estimate of all others but each row's target y (m,)."""
        hit = self._sample == y[:, None]
        left = (SAMPLE - hit.sum(1)).clamp(min=1)
        correction = ((len(self.others) - 1) / left).log() - self._log_weight
        return (logits + correction[:, None]).masked_fill(hit, -torch.inf)
