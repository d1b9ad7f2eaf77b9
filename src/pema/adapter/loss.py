"""The joint loss, with a cross-entropy that never stores the logits of a whole batch."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import cross_entropy, linear

from pema.adapter.copying import NEVER, Copied
from pema.adapter.dropout import Dropout
from pema.adapter.fused import is_usable, losses_of
from pema.adapter.module import Adapter
from pema.devices import is_asynchronous
from pema.errors import AdapterError
from pema.memory.prompts import ContextTokens
from pema.owner.head import Head

CHUNK_BYTES = {"cpu": 16 << 20}
"""Bytes of float32 logits in memory at a time: on a CPU the size of its last-level cache; elsewhere 256 MiB."""

LEAST_ROWS = 256
"""Minimum rows per chunk: fewer make matrix products slow. Such a chunk takes 256 / d of the bytes of W_hd."""

WIDENED_BYTES = 1 << 28
"""Maximum bytes in float32 of a half-precision W_hd that is converted once to float32, which is faster."""

PIECES = 8
"""Size of a converted piece of W_hd, as part of a chunk's bytes: small enough to be read again from a core's cache."""


class Losses(NamedTuple):
    """Scalars: L and its two parts, each a mean over the pairs of a batch."""

    total: Tensor
    reconstruction: Tensor
    prediction: Tensor


class JointLoss:
    """Joint loss L = kappa * mean ||f - h_rct||^2 + (1 - kappa) * CE(softmax(W_hd h_pd), y).

    The mean of the first term is over pairs and over the d entries of f, as in the published code.
    """

    def __init__(self, cross_entropy: CrossEntropy | OwnCrossEntropy, kappa: float, W_hd: Tensor | None = None) -> None:
        """Combine the two terms.

        Args:
            cross_entropy: the second term.
            kappa: weight of the first term.
            W_hd: (V, d), for an adapter that copies.
        """
        self.kappa, self.cross_entropy, self.W_hd = kappa, cross_entropy, W_hd
        self.bfloat16 = cross_entropy.dtype == torch.bfloat16

    def __call__(
        self,
        adapter: Adapter,
        f: Tensor,
        targets: Tensor,
        dropout: Dropout | None = None,
        *,
        context: ContextTokens | None = None,
        forced: bool = False,
    ) -> Losses:
        """Return the loss of a batch.

        Args:
            adapter: the adapter.
            f: (b, d) float32.
            targets: (b,) int64 token ids.
            dropout: dropout on the adapter's input.
            context: the tokens of the contexts, for an adapter that copies.
            forced: whether targets that can be copied count as copies only: -log(g P_copy(y)). So the vocabulary does
                not learn them, and cannot say the names of the training data instead of the input's.
        """
        with torch.autocast(f.device.type, torch.bfloat16, enabled=self.bfloat16):
            z = adapter.compress(f, dropout)
            prediction = reconstruction = f.new_zeros(())
            if self.kappa > 0:
                if adapter.B_rct is None:
                    raise AdapterError(f"kappa={self.kappa} needs B_rct: fit the reconstruction first.")
                h_rct = linear(z, adapter.B_rct)
                reconstruction = (f - h_rct).square().mean()
            copied = adapter.copy(f, context, self.W_hd, dropout)
            if copied is not None:
                prediction = self.with_copies(copied, adapter.predict(f, z), targets, forced=forced)
            elif self.kappa < 1:
                prediction = self.cross_entropy(adapter.predict(f, z), targets)
        return Losses(self.kappa * reconstruction + (1 - self.kappa) * prediction, reconstruction, prediction)

    def with_copies(self, copied: Copied, h: Tensor, targets: Tensor, *, forced: bool) -> Tensor:
        """Return the mean of -log P_PEMA(y), or of the loss of `forced` copies, of targets (b,) and h_pd (b, d)."""
        if not forced:
            return -copied.mixed(-self.cross_entropy.each(h, targets), targets).mean()
        log_copy = copied.log_p(targets)
        is_copy = log_copy > NEVER / 2
        if is_asynchronous(h.device):  # which is not waited for to know how many others there are
            return self.cross_entropy(h, targets, ~is_copy) - torch.where(is_copy, log_copy, copied.log_rest).mean()
        others = is_copy.logical_not().nonzero()[:, 0]
        total = log_copy[is_copy].sum() + copied.log_rest[others].sum()
        if len(others):
            total = total - len(others) * self.cross_entropy(h[others], targets[others])
        return -total / len(targets)


class CrossEntropy:
    """Mean of -log softmax(W_hd h)_y over the batch, computed in chunks of rows.

    Each chunk yields its loss and its gradient together: dL/dh = (softmax(W_hd h) - onehot(y)) W_hd / n. W_hd is
    frozen, so the backward pass needs nothing else, and the logits are freed with the chunk.

    A large W_hd in half precision stays so: for products in float32 it is converted a piece at a time,
    which costs a few per cent of the time and halves its memory.
    """

    def __init__(
        self, head: Head, tokens: Tensor | None = None, *, bfloat16: bool = False, chunk_bytes: int | None = None
    ) -> None:
        """Convert W_hd to the layout of training.

        Args:
            head: the frozen head.
            tokens: (V',) the seen vocabulary, or None for all V.
            bfloat16: multiply matrices in bfloat16.
            chunk_bytes: maximum size of the logits in memory at a time; None: chosen by the device.
        """
        self.position: Tensor | None = None
        if tokens is not None:
            self.position = tokens.new_full((head.vocabulary_size,), -1)
            self.position[tokens] = torch.arange(len(tokens), device=tokens.device)
            head = head.subset(tokens)
        # The head itself is not kept: a converted W_hd would stay in memory twice.
        self.scale, self.soft_cap = head.scale, head.soft_cap
        self.bias = None if head.bias is None else head.bias.detach().float() * head.scale
        self.dtype = torch.bfloat16 if bfloat16 else torch.float32
        weight, device = head.weight.detach(), head.weight.device
        self.V, d = weight.shape
        chunk_bytes = chunk_bytes or CHUNK_BYTES.get(device.type, 256 << 20)
        self.rows = max(LEAST_ROWS, chunk_bytes // (4 * self.V))
        self.piece = max(LEAST_ROWS, chunk_bytes // PIECES // (4 * d))
        if bfloat16 or 4 * self.V * d <= WIDENED_BYTES:
            weight = weight.to(self.dtype)
        self.W_hd = weight.contiguous()
        self._logits = torch.empty(0, device=device)
        self._rounded = torch.empty(0, dtype=torch.bfloat16, device=device)
        self._widened = torch.empty(0, device=device)

    @functools.cached_property
    def is_fused(self) -> bool:
        """Whether softmax, loss and gradient are one kernel."""
        return self.dtype == torch.bfloat16 and is_usable(self.W_hd.device)

    def __call__(self, h: Tensor, targets: Tensor, weights: Tensor | None = None) -> Tensor:
        """Return the mean loss of h (n, d) with token ids `targets` (n,): a scalar, differentiable in h.

        With `weights` (n,), the loss of each row is multiplied by its weight.

        Raises:
            AdapterError: a target is outside the vocabulary.
        """
        loss: Tensor = _Chunked.apply(h, self.places(targets), weights, self)  # type: ignore[no-untyped-call]
        return loss

    def places(self, targets: Tensor) -> Tensor:
        """Return the rows of W_hd of token ids (n,).

        Raises:
            AdapterError: a target is outside the vocabulary, on a device that the program waits for.
        """
        if self.position is None:
            return targets
        places = self.position[targets]
        # An accelerator is not waited for at each step: what a run trains on are the targets of its own memory.
        if not is_asynchronous(places.device) and bool((places < 0).any()):
            raise AdapterError("a target is not in the seen vocabulary: use vocabulary='full'.")
        return places

    @torch.no_grad()
    def each(self, h: Tensor, targets: Tensor) -> Tensor:
        """Return the loss of each row of h (n, d) with token ids `targets` (n,): (n,) float32, without a gradient."""
        return self.sweep(h.float(), self.places(targets), gradient=False)[2]

    def sweep(
        self, h: Tensor, targets: Tensor, gradient: bool, weights: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """Return the mean loss, its gradient in h, and the loss of each row, computed chunk by chunk."""
        n = h.shape[0]
        dh = torch.empty(h.shape, dtype=torch.float32, device=h.device) if gradient else None
        losses = torch.empty(n, device=h.device)
        for start in range(0, n, self.rows):
            rows = slice(start, min(start + self.rows, n))
            losses[rows] = self.chunk(h[rows], targets[rows], None if dh is None else dh[rows])
        if dh is not None:
            dh *= self.scale / n if weights is None else (weights * (self.scale / n))[:, None]
        if weights is not None:
            losses *= weights
        return losses.mean(dtype=torch.float64).float(), dh, losses

    def chunk(self, h: Tensor, y: Tensor, dh: Tensor | None) -> Tensor:
        """Return the loss of each row of h (c, d) with targets y (c,); write the gradient of their sum into `dh`."""
        if self.is_fused:
            x = torch.mm(self.scaled(h).to(self.dtype), self.W_hd.t())
            losses = losses_of(x, y, self.bias, self.soft_cap)
            if dh is not None:
                dh.copy_(torch.mm(x, self.W_hd))
            return losses
        p = self.logits(h)
        slope = self.slope(p) if dh is not None else None
        x_y = p.gather(1, y[:, None])[:, 0]
        losses = normalise(p) - x_y
        if dh is not None:
            p.scatter_add_(1, y[:, None], p.new_full((len(y), 1), -1.0))
            self.step_back(p if slope is None else p.mul_(slope), dh)
        return losses

    def scaled(self, h: Tensor) -> Tensor:
        """Return h times the scale of the logits."""
        return h * self.scale if self.scale != 1 else h

    def logits(self, h: Tensor) -> Tensor:
        """Compute the head's logits of (c, d): (c, V) float32, in a buffer that the next chunk reuses."""
        h = self.scaled(h)
        self._logits, out = _view(self._logits, len(h), self.V)
        if self.dtype != torch.float32:
            self._rounded, rounded = _view(self._rounded, len(h), self.V)
            out.copy_(torch.mm(h.to(self.dtype), self.W_hd.t(), out=rounded))
            out = out if self.bias is None else out.add_(self.bias)
        else:
            for columns, W_hd in self.pieces():
                if self.bias is None:
                    torch.mm(h, W_hd.t(), out=out[:, columns])
                else:
                    torch.addmm(self.bias[columns], h, W_hd.t(), out=out[:, columns])
        if self.soft_cap is not None:
            out.div_(self.soft_cap).tanh_().mul_(self.soft_cap)
        return out

    def pieces(self) -> Iterator[tuple[slice, Tensor]]:
        """Yield W_hd in the dtype of training, some tokens at a time; all at once if it is stored in that dtype."""
        if self.W_hd.dtype == self.dtype:
            yield slice(0, self.V), self.W_hd
            return
        self._widened, rows = _view(self._widened, self.piece, self.W_hd.shape[1])
        for start in range(0, self.V, self.piece):
            tokens = slice(start, min(start + self.piece, self.V))
            yield tokens, rows[: tokens.stop - start].copy_(self.W_hd[tokens])

    def slope(self, logits: Tensor) -> Tensor | None:
        """Return the derivative of the soft cap cap tanh(x / cap) at capped logits, 1 - tanh(x / cap)^2: (c, V)."""
        cap = self.soft_cap
        return None if cap is None else (logits / cap).square_().neg_().add_(1)

    def step_back(self, dlogits: Tensor, out: Tensor) -> None:
        """Compute dL/dlogits W_hd, (c, V) -> (c, d), into `out`."""
        if self.dtype != torch.float32:
            self._rounded, rounded = _view(self._rounded, *dlogits.shape)
            out.copy_(torch.mm(rounded.copy_(dlogits), self.W_hd))
            return
        for columns, W_hd in self.pieces():
            if columns.start == 0:
                torch.mm(dlogits[:, columns], W_hd, out=out)
            else:
                out.addmm_(dlogits[:, columns], W_hd)


class OwnCrossEntropy:
    """Mean of -log softmax(U h)_y over the batch, with the output matrix U of the adapter, which is trained.

    U has a row for each token of the memory's targets, so that the logits of a batch fit into memory.
    """

    def __init__(self, head: Head, adapter: Adapter, *, bfloat16: bool = False) -> None:
        """Keep what is needed of the head: its bias, scale and soft cap.

        Args:
            head: the frozen head.
            adapter: an adapter with the vocabulary "own".
            bfloat16: multiply matrices in bfloat16.
        """
        assert adapter.tokens is not None
        self._head, self._adapter = head, adapter
        self._position = adapter.tokens.new_full((head.vocabulary_size,), -1)
        self._position[adapter.tokens] = torch.arange(len(adapter.tokens), device=adapter.tokens.device)
        self.dtype = torch.bfloat16 if bfloat16 else torch.float32

    def __call__(self, h: Tensor, targets: Tensor, weights: Tensor | None = None) -> Tensor:
        """Return the mean loss of h (n, d) with token ids `targets` (n,), times `weights` (n,): a scalar."""
        logits, places = self._adapter.logits(h, self._head), self._position[targets]
        if weights is None:
            return cross_entropy(logits, places)
        return (cross_entropy(logits, places, reduction="none") * weights).mean()

    @torch.no_grad()
    def each(self, h: Tensor, targets: Tensor) -> Tensor:
        """Return the loss of each row of h (n, d) with token ids `targets` (n,): (n,) float32, without a gradient."""
        return cross_entropy(self._adapter.logits(h.float(), self._head), self._position[targets], reduction="none")


def _view(buffer: Tensor, rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """Return a (rows, columns) view of a buffer, and the buffer: the given one, or a new one if that is too small.

    Memory of an accelerator is new each time: its allocator keeps it, and a captured step has memory of its own.
    """
    if is_asynchronous(buffer.device):
        return buffer, buffer.new_empty(rows, columns)
    if buffer.numel() < rows * columns:
        buffer = buffer.new_empty(rows * columns)
    return buffer, buffer[: rows * columns].view(rows, columns)


def normalise(logits: Tensor) -> Tensor:
    """Turn logits (c, V) into softmax(logits) in place; return log sum exp(logits), (c,).

    It is computed from the largest entry as x_max - log p_max, which cannot underflow: p_max >= 1 / V.
    """
    x_max = logits.amax(-1)
    torch.softmax(logits, -1, out=logits)
    return x_max - logits.amax(-1).log()


class _Chunked(torch.autograd.Function):
    """Autograd function of `CrossEntropy.sweep`."""

    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401
        h: Tensor,
        targets: Tensor,
        weights: Tensor | None,
        cross_entropy: CrossEntropy,
    ) -> Tensor:
        loss, ctx.dh, _ = cross_entropy.sweep(h.detach().float(), targets, ctx.needs_input_grad[0], weights)
        ctx.dtype = h.dtype
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:  # noqa: ANN401
        return (ctx.dh * gradient).to(ctx.dtype), None, None, None
