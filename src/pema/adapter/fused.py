"""Cross-entropy and its gradient in one kernel for GPUs, compiled by Triton, which torch brings along for them.

The logits are read twice and the gradient is written in their place: less than half of what separate operators read and
write. Kernels that also fuse the products with W_hd compute these again, or in small pieces, which is slower for the
hundreds of rows of a step.
"""

import functools

import torch
from torch import Tensor

from pema.console import note

try:
    import triton
    import triton.language as tl
except ImportError:  # on a CPU
    triton = None

BLOCK = 4096
"""Number of logits that one step of the kernel reads."""

WARPS = 16


if triton is not None:

    @triton.jit  # type: ignore[untyped-decorator]
    def _kernel(  # type: ignore[no-untyped-def]
        logits,  # noqa: ANN001
        bias,  # noqa: ANN001
        targets,  # noqa: ANN001
        losses,  # noqa: ANN001
        V,  # noqa: ANN001
        cap,  # noqa: ANN001
        has_bias: tl.constexpr,
        has_cap: tl.constexpr,
        block: tl.constexpr,
    ) -> None:
        """Process a row: two passes over its logits, with the largest and the sum of exponentials from the first."""
        row = tl.program_id(0).to(tl.int64)
        logits += row * V
        y = tl.load(targets + row)
        most, total, x_y = float("-inf"), 0.0, 0.0
        for first in range(0, V, block):
            at = first + tl.arange(0, block)
            x = tl.load(logits + at, mask=at < V, other=float("-inf")).to(tl.float32)
            if has_bias:
                x += tl.load(bias + at, mask=at < V, other=0.0)
            if has_cap:
                t = 1 - 2 / (tl.exp(2 * x / cap) + 1)  # tanh
                x = tl.where(at < V, cap * t, float("-inf"))
            x_y += tl.sum(tl.where(at == y, x, 0.0))
            largest = tl.maximum(most, tl.max(x))
            total = total * tl.exp(most - largest) + tl.sum(tl.exp(x - largest))
            most = largest
        tl.store(losses + row, most + tl.log(total) - x_y)
        for first in range(0, V, block):
            at = first + tl.arange(0, block)
            x = tl.load(logits + at, mask=at < V, other=0.0).to(tl.float32)
            if has_bias:
                x += tl.load(bias + at, mask=at < V, other=0.0)
            slope = 1.0
            if has_cap:
                t = 1 - 2 / (tl.exp(2 * x / cap) + 1)
                x, slope = cap * t, 1 - t * t
            gradient = (tl.exp(x - most) / total - tl.where(at == y, 1.0, 0.0)) * slope
            tl.store(logits + at, gradient.to(logits.dtype.element_ty), mask=at < V)


def losses_of(logits: Tensor, targets: Tensor, bias: Tensor | None = None, soft_cap: float | None = None) -> Tensor:
    """Return -log softmax(x)_y of each row, and replace the logits by their gradient, softmax(x) - onehot(y).

    x is cap tanh((logits + bias) / cap), or logits + bias without a soft cap.

    Args:
        logits: (n, V) bfloat16, contiguous, on a GPU.
        targets: (n,) int64, the rows' y.
        bias: (V,) float32.
        soft_cap: the cap.

    Returns:
        (n,) float32.
    """
    n, V = logits.shape
    losses = torch.empty(n, device=logits.device)
    if n:
        given = (logits, logits if bias is None else bias, targets, losses, V, soft_cap or 1.0)
        with torch.cuda.device(logits.device):
            _kernel[(n,)](*given, bias is not None, soft_cap is not None, BLOCK, num_warps=WARPS)
    return losses


@functools.cache
def is_usable(device: torch.device) -> bool:
    """Return whether the kernel can be compiled for a device; if it should be, a note says why it cannot."""
    if device.type != "cuda":
        return False
    if triton is None:
        note("the loss is computed by separate operators, because Triton is not installed: pip install triton")
        return False
    try:
        losses_of(
            torch.zeros(1, 2, dtype=torch.bfloat16, device=device), torch.zeros(1, dtype=torch.int64, device=device)
        )
    except Exception as error:  # whatever a compiler may lack
        note(f"the loss is computed by separate operators, because Triton failed: {error}")
        return False
    return True
