"""Reconstruction (the paper's section 3.3.1): A and B_rct that minimise ||f - B_rct A f||^2 over a memory."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, mse_loss

from pema.adapter.optimisation import EarlyStopping, descend
from pema.console import progress
from pema.errors import AdapterError, ConfigError
from pema.memory.reader import CPU, View
from pema.processes import ALONE, Processes

ROWS = 8192
"""Maximum number of representations read at a time."""

ROWS_BYTES = 1 << 24
"""Maximum bytes of float32 representations read at a time."""

STRIPES = 4
"""Number of stripes of the symmetric second moment; each is computed from the diagonal on: 5/8 of the products."""


def closed_form(
    view: View, rank: int, d: int, processes: Processes = ALONE, device: torch.device = CPU
) -> tuple[Tensor, Tensor, float]:
    """Return the best A and B_rct of rank r: A = U^T and B_rct = U, with U the top r eigenvectors of mean(f f^T).

    No pair of matrices of that rank reconstructs the memory better (Eckart-Young). It takes one pass over the memory
    and one eigendecomposition of d x d; products are summed in float64.

    Args:
        view: the memory, or a part of it.
        rank: r, at most d.
        d: width of a representation.
        processes: several processes read a part of the view each.
        device: device of the products and of the eigendecomposition.

    Returns:
        A (r, d) and B_rct (d, r), on the CPU, and the error on `view`: the mean over pairs and entries of
        (f - B_rct A f)^2.

    Raises:
        ConfigError: r is larger than d.
        AdapterError: the view is empty, or a representation in it is not finite.
    """
    _check(view, rank, d)
    moment = torch.zeros(d, d, dtype=torch.float64, device=device)
    pairs = torch.zeros(1, dtype=torch.int64)
    share = view.share(processes)
    with progress("reconstruction", share.pairs, "pairs") as advance:
        for batch in share.batches(_rows(d), device=device):
            add_products(moment, batch.representations)
            advance(len(batch.representations))
            pairs += len(batch.representations)
    processes.add(moment)
    moment /= int(processes.add(pairs))
    if not bool(moment.isfinite().all()):
        raise AdapterError(where_not_finite(view))
    values, vectors = torch.linalg.eigh(moment, UPLO="U")
    U = vectors[:, -rank:].flip(1).float().cpu().contiguous()
    error = float(values[: d - rank].clamp_min(0).sum()) / d
    return U.T.contiguous(), U, error


def add_products(moment: Tensor, f: Tensor) -> None:
    """Add f^T f to the upper triangle of `moment`, in place: (d, d) float64, (n, d) float32.

    Entries below the diagonal are meaningless.
    """
    d = len(moment)
    width = -(-d // STRIPES)
    for i in range(0, d, width):
        moment[i : i + width, i:] += f[:, i : i + width].T @ f[:, i:]


def fit_reconstruction_sgd(
    view: View,
    rank: int,
    d: int,
    *,
    held_out: View | None = None,
    learning_rate: float = 1e-3,
    epochs: int = 200,
    batch_size: int = 256,
    patience: int = 3,
    seed: int = 0,
    processes: Processes = ALONE,
) -> tuple[Tensor, Tensor, float]:
    """Fit A and B_rct by the paper's procedure: Adam, with early stopping on the held-out error.

    Args:
        view: the memory, or a part of it.
        rank: r.
        d: width of a representation.
        held_out: pairs for early stopping; None: `view` itself.
        learning_rate: learning rate of Adam.
        epochs: maximum number of passes over `view`.
        batch_size: pairs in a step.
        patience: number of epochs without a lower held-out error before it stops.
        seed: seed of the initial values and of the order.
        processes: several processes compute a part of each batch's gradient each.

    Returns:
        A (r, d) and B_rct (d, r) of the lowest held-out error, and the error on `view`.

    Raises:
        ConfigError: r is larger than d.
        AdapterError: the view is empty, a representation is not finite, or the loss diverged.
    """
    _check(view, rank, d)
    held_out = held_out or view
    random = torch.Generator().manual_seed(seed)
    A = nn.Parameter((torch.rand(rank, d, generator=random) * 2 - 1) * d**-0.5)
    B_rct = nn.Parameter((torch.rand(d, rank, generator=random) * 2 - 1) * rank**-0.5)
    adam = torch.optim.Adam([A, B_rct], lr=learning_rate)
    stopping, best = EarlyStopping(patience), (A.detach().clone(), B_rct.detach().clone())
    with progress("reconstruction", epochs * view.pairs, "pairs") as advance:
        for epoch in range(epochs):
            for part in view.parts(batch_size, processes, shuffle_seed=seed + epoch):
                f = part.batch.representations
                loss = mse_loss(linear(linear(f, A), B_rct), f) if len(f) else None
                descend(adam, loss, (A, B_rct), learning_rate, clip=0, share=part.weight, processes=processes)
                advance(len(part.rows))
            error = reconstruction_error(held_out, A.detach(), B_rct.detach(), processes)
            if not error < float("inf"):
                raise AdapterError(
                    where_not_finite(view, f"reconstruction diverged in epoch {epoch + 1}: lower its learning rate.")
                )
            if stopping.is_lowest(error):
                best = (A.detach().clone(), B_rct.detach().clone())
            if stopping.is_over:
                break
    return *best, reconstruction_error(view, *best, processes)


def reconstruction_error(view: View, A: Tensor, B_rct: Tensor, processes: Processes = ALONE) -> float:
    """Return the mean over pairs and entries of (f - B_rct A f)^2: A (r, d), B_rct (d, r)."""
    sums = torch.zeros(2, dtype=torch.float64)
    for batch in view.share(processes).batches(_rows(A.shape[1])):
        f = batch.representations
        sums[0] += (f - (f @ A.T) @ B_rct.T).square().sum(dtype=torch.float64)
        sums[1] += len(f)
    total, pairs = processes.add(sums).tolist()
    return float(total / (pairs * A.shape[1]))


def where_not_finite(view: View, otherwise: str = "the loss is not finite.") -> str:
    """Return a message with the first pair of `view` whose representation is not finite, or `otherwise`."""
    first = 0
    for batch in view.batches(ROWS):
        bad = ~batch.representations.isfinite().all(dim=1)
        if bool(bad.any()):
            row = int(bad.nonzero()[0, 0])
            return (
                f"the representation of pair {first + row} (of {view.pairs}; step {int(batch.steps[row])} of its "
                "example) is not finite: the PLM overflowed. Build the memory again in float32 or bfloat16."
            )
        first += len(bad)
    return otherwise


def _rows(d: int) -> int:
    """Return the number of representations of width d that are read at a time."""
    return max(min(ROWS, ROWS_BYTES // (4 * d)), 1)


def _check(view: View, rank: int, d: int) -> None:
    if rank > d:
        raise ConfigError(f"rank={rank} is larger than d = {d}: reconstruction has d directions.")
    if not view.pairs:
        raise AdapterError("the memory contains no pairs to train on: build it with more examples.")
