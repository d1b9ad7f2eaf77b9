"""The sum of the clipped gradients of DP-SGD, computed without storing the gradient of any example."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear

from pema.adapter.loss import CrossEntropy
from pema.adapter.module import Adapter


class Gradient(NamedTuple):
    """Gradient of the adapter: A (r, d) and B_pd (d, r), float32."""

    A: Tensor
    B_pd: Tensor


def clipped_sum(
    adapter: Adapter,
    cross_entropy: CrossEntropy,
    f: Tensor,
    targets: Tensor,
    lengths: Tensor,
    clip: float,
    *,
    bfloat16: bool = False,
) -> Gradient:
    """Return sum_e g_e min(1, C / ||g_e||); g_e is the gradient of example e's mean loss over its pairs in A and B_pd.

    With x what A reads, z = A x, a what B_pd reads and h = h_pd, for the n pairs of an example (rows) the gradients are
    dL/dA = dL/dz^T x and dL/dB_pd = dL/dh^T a. Their norms need only n x n products of rows,
    ||dL/dA||^2 = sum_{s,t} (dL/dz_s . dL/dz_t) (x_s . x_t), and likewise for B_pd ("ghost norms", Li et al. 2022); the
    clipping factors are then applied to the rows, so the sum over examples is one product per matrix.

    Args:
        adapter: the adapter.
        cross_entropy: the loss of the frozen head.
        f: (b, d) float32, the pairs of the examples one after another.
        targets: (b,) token ids.
        lengths: (e,) number of pairs of each example, at least 1.
        clip: C, the maximum norm of one example's gradient over both matrices together.
        bfloat16: multiply matrices in bfloat16; norms and sum are computed from the same products, so the bound holds.
    """
    with torch.no_grad(), torch.autocast(f.device.type, torch.bfloat16, enabled=bfloat16):
        x = adapter.normalise(f)
        z = linear(x, adapter.A)
        with torch.enable_grad():
            z.requires_grad_()
            a = adapter.activate(z)
            h = adapter.predict(f, a)
            loss = cross_entropy(h, targets) * len(targets)
            dz, dh = torch.autograd.grad(loss, [z, h])
    weight = lengths.reciprocal().repeat_interleave(lengths)[:, None]
    x, a, dz, dh = x.float(), a.detach().float(), dz.float() * weight, dh.float() * weight
    norms = _norms(dz, x, dh, a, lengths)
    factor = (clip / norms).clamp(max=1).float().repeat_interleave(lengths)[:, None]
    return Gradient((dz * factor).T @ x, (dh * factor).T @ a)


def _norms(dz: Tensor, x: Tensor, dh: Tensor, a: Tensor, lengths: Tensor) -> Tensor:
    """Return the norm of every example's gradient: (e,) float64.

    It needs float64: if the gradients of an example's pairs cancel, its norm is a small difference of large numbers.
    """
    squares = []
    parts = (torch.split(t.double(), lengths.tolist()) for t in (dz, x, dh, a))
    for rows in zip(*parts, strict=True):
        of_dz, of_x, of_dh, of_a = (row @ row.T for row in rows)
        squares.append((of_dz * of_x + of_dh * of_a).sum())
    return torch.stack(squares).clamp_min(0).sqrt()
