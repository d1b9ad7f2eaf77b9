"""The cross-entropy of training over a large vocabulary, with a normaliser estimated from a sample."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pema.adapter.config import SAMPLE
from pema.adapter.loss import CrossEntropy
from pema.owner.head import Head


class SampledCrossEntropy(CrossEntropy):
    """Estimate of -log softmax(W_hd h)_y over all V tokens from the seen tokens and a sample of the others.

    The normaliser is sum_{seen} exp(x_j) + (V - V') / S sum_{sample} exp(x_j), whose mean over the samples is
    the exact one (Jean et al. 2015, "On using very large target vocabulary", section 3, with a uniform sample and the
    targets always included). So the other tokens stay calibrated, although no target is among them.
    """

    def __init__(self, head: Head, tokens: Tensor, seed: int, *, bfloat16: bool = False) -> None:
        """Prepare W_hd for training.

        Args:
            head: the frozen head, with at least `SAMPLE` unseen tokens.
            tokens: (V',) the seen tokens.
            seed: seed of the samples.
            bfloat16: multiply matrices in bfloat16.
        """
        device = head.weight.device
        others = torch.ones(head.vocabulary_size, dtype=torch.bool, device=device)
        others[tokens] = False
        self.others = others.nonzero()[:, 0]
        self.seen, self.seed = len(tokens), seed
        super().__init__(head, torch.cat((tokens, self.others[:SAMPLE])), bfloat16=bfloat16)
        assert self.position is not None
        self.position[self.others] = -1  # sampled tokens have no fixed position, and no target is among them
        self._head_weight, self._head_bias = head.weight.detach(), head.bias
        self._log_weight = math.log(len(self.others) / SAMPLE)
        self._random = torch.Generator()

    def at(self, step: int) -> SampledCrossEntropy:
        """Draw the sample of `step`; it depends only on the seed and the step."""
        self._random.manual_seed((self.seed * 0x9E3779B97F4A7C15 + step * 0xBF58476D1CE4E5B9 + 1) % (1 << 63))
        drawn = torch.randint(len(self.others), (SAMPLE,), generator=self._random)
        sample = self.others[drawn.to(self.others.device)]
        # On a CPU `index_select` copies whole rows, ten times faster than indexing.
        self.W_hd[self.seen :] = self._head_weight.index_select(0, sample).to(self.W_hd.dtype)
        if self.bias is not None and self._head_bias is not None:
            self.bias[self.seen :] = self._head_bias[sample].float() * self.scale
        return self

    def weigh(self, logits: Tensor) -> None:
        """Add log((V - V') / S) to the logits of the sample."""
        logits[:, self.seen :] += self._log_weight
