"""The joint loss, with a cross-entropy that never holds the logits of a whole batch."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

from pema.adapter.dropout import Dropout
from pema.adapter.module import Adapter
from pema.errors import AdapterError
from pema.owner.head import Head

CHUNK_BYTES = {"cpu": 16 << 20}
"""float32 logits alive at a time: on a CPU as many as its last-level cache holds; elsewhere 256 MiB."""

LEAST_ROWS = 256
"""Fewer rows than this make the matrix products slow; a chunk of it takes 256 / d of what W_hd takes."""


def has_bfloat16(device: torch.device) -> bool:
    """Whether the processor multiplies bfloat16 matrices itself; without that they are slower than float32."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return device.type == "cpu" and bool(torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported())


class Losses(NamedTuple):
    """L and its two parts, each a mean over the pairs of a batch; scalars."""

    total: Tensor
    reconstruction: Tensor
    prediction: Tensor


class JointLoss:
    """L = kappa * mean ||f - h_rct||^2 + (1 - kappa) * CE(softmax(W_hd h_pd), y).

    The mean of the first term is over pairs and over the d entries of f, as in the published code.
    """

    def __init__(self, head: Head, kappa: float, tokens: Tensor | None = None, *, bfloat16: bool = False) -> None:
        """Prepare W_hd for training.

        Args:
            head: the frozen head.
            kappa: weight of the first term.
            tokens: (V',) the seen vocabulary, or None for all V.
            bfloat16: multiply matrices in bfloat16.
        """
        self.kappa, self.bfloat16 = kappa, bfloat16
        self.cross_entropy = CrossEntropy(head, tokens, bfloat16=bfloat16)

    def __call__(self, adapter: Adapter, f: Tensor, targets: Tensor, dropout: Dropout | None = None) -> Losses:
        """The loss of a batch: f (b, d) float32, targets (b,) int64 token ids."""
        with torch.autocast(f.device.type, torch.bfloat16, enabled=self.bfloat16):
            z = adapter.compress(f, dropout)
            prediction = reconstruction = f.new_zeros(())
            if self.kappa > 0:
                if adapter.B_rct is None:
                    raise AdapterError(f"kappa={self.kappa} needs B_rct: fit the reconstruction first.")
                h_rct = linear(z, adapter.B_rct)
                reconstruction = (f - h_rct).square().mean()
            if self.kappa < 1:
                prediction = self.cross_entropy(adapter.predict(f, z), targets)
        return Losses(self.kappa * reconstruction + (1 - self.kappa) * prediction, reconstruction, prediction)


class CrossEntropy:
    """-log softmax(W_hd h)_y, mean over the batch, in chunks of rows.

    Each chunk yields its loss and its gradient in one go: dL/dh = (softmax(W_hd h) - onehot(y)) W_hd / n. W_hd is
    frozen, so this is all that the backward pass needs, and the logits are dropped with the chunk.
    """

    def __init__(
        self, head: Head, tokens: Tensor | None = None, *, bfloat16: bool = False, chunk_bytes: int | None = None
    ) -> None:
        """Copy W_hd into the layout and dtype of training; see `JointLoss` for the arguments."""
        self.position: Tensor | None = None
        if tokens is not None:
            self.position = tokens.new_full((head.vocabulary_size,), -1)
            self.position[tokens] = torch.arange(len(tokens), device=tokens.device)
            head = head.subset(tokens)
        self.head = head
        self.dtype = torch.bfloat16 if bfloat16 else torch.float32
        self.W_hd = head.weight.detach().to(self.dtype).contiguous()
        self.bias = None if head.bias is None else head.bias.detach().float() * head.scale
        device = self.W_hd.device
        self.V = self.W_hd.shape[0]
        self.rows = max(LEAST_ROWS, (chunk_bytes or CHUNK_BYTES.get(device.type, 256 << 20)) // (4 * self.V))
        self._logits = torch.empty(0, device=device)

    def __call__(self, h: Tensor, targets: Tensor) -> Tensor:
        """Mean loss of h (n, d) with token ids `targets` (n,): a scalar, differentiable in h.

        Raises:
            AdapterError: a target lies outside the vocabulary.
        """
        if self.position is not None:
            targets = self.position[targets]
            if bool((targets < 0).any()):
                raise AdapterError("a target is not in the seen vocabulary: use vocabulary='full'.")
        loss: Tensor = _Chunked.apply(h, targets, self)  # type: ignore[no-untyped-call]
        return loss

    def sweep(self, h: Tensor, targets: Tensor, gradient: bool) -> tuple[Tensor, Tensor | None]:
        """Mean loss, and its gradient in h, chunk by chunk."""
        n = h.shape[0]
        dh = torch.empty(h.shape, dtype=torch.float32, device=h.device) if gradient else None
        total = torch.zeros((), dtype=torch.float64, device=h.device)
        for start in range(0, n, self.rows):
            rows = slice(start, min(start + self.rows, n))
            y = targets[rows, None]
            p = self.logits(h[rows])
            slope = self.slope(p) if dh is not None else None
            total += _probabilities(p, y)
            if dh is not None:
                p.scatter_add_(1, y, p.new_full(y.shape, -1.0))
                self.step_back(p if slope is None else p.mul_(slope), dh[rows])
        if dh is not None:
            dh *= self.head.scale / n
        return (total / n).float(), dh

    def logits(self, h: Tensor) -> Tensor:
        """Head logits of (c, d): (c, V) float32, in a buffer that the next chunk reuses."""
        h = h * self.head.scale if self.head.scale != 1 else h
        if self.dtype != torch.float32:
            out = torch.mm(h.to(self.dtype), self.W_hd.t()).float()
            out = out if self.bias is None else out.add_(self.bias)
        else:
            if self._logits.numel() < len(h) * self.V:
                self._logits = torch.empty(len(h) * self.V, device=h.device)
            out = self._logits[: len(h) * self.V].view(len(h), self.V)
            if self.bias is None:
                torch.mm(h, self.W_hd.t(), out=out)
            else:
                torch.addmm(self.bias, h, self.W_hd.t(), out=out)
        if self.head.soft_cap is not None:
            out.div_(self.head.soft_cap).tanh_().mul_(self.head.soft_cap)
        return out

    def slope(self, logits: Tensor) -> Tensor | None:
        """Derivative of the soft cap at capped logits: cap tanh(x / cap) has 1 - tanh(x / cap)^2. Shape (c, V)."""
        cap = self.head.soft_cap
        return None if cap is None else (logits / cap).square_().neg_().add_(1)

    def step_back(self, dlogits: Tensor, out: Tensor) -> None:
        """dL/dlogits W_hd: (c, V) -> (c, d) into `out`."""
        if self.dtype == torch.float32:
            torch.mm(dlogits, self.W_hd, out=out)
        else:
            out.copy_(torch.mm(dlogits.to(self.dtype), self.W_hd))


def _probabilities(logits: Tensor, y: Tensor) -> Tensor:
    """Turn logits (c, V) into softmax(logits) in place; returns the summed loss of the targets y (c, 1).

    log sum exp is read off the largest entry, x_max - log p_max, which cannot underflow: p_max >= 1 / V.
    """
    x_max, x_y = logits.amax(-1), logits.gather(1, y)[:, 0]
    torch.softmax(logits, -1, out=logits)
    return (x_max - logits.amax(-1).log() - x_y).sum(dtype=torch.float64)


class _Chunked(torch.autograd.Function):
    """Ties `CrossEntropy.sweep` into autograd."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, targets: Tensor, cross_entropy: CrossEntropy) -> Tensor:  # noqa: ANN401
        loss, ctx.dh = cross_entropy.sweep(h.detach().float(), targets, ctx.needs_input_grad[0])
        ctx.dtype = h.dtype
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:  # noqa: ANN401
        return (ctx.dh * gradient).to(ctx.dtype), None, None
