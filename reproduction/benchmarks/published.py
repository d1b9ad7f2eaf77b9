"""A reimplementation of the published procedure from its description, as a baseline of measurements.

It has these parts of the published training code: a data set that returns one row at a time from a float32 memory map,
collated into batches; batches in stored order; LoRA's linear layer with alpha = 1, so that every product of A is
divided by r, with A from U(-1/sqrt(d), 1/sqrt(d)) and B zero; dropout 0.2 on the layer's input, drawn again for each of
its two outputs; the logits of the whole batch in float32 through autograd; Adam with learning rate 1e-3; the published
commands' batch sizes (20,480 pairs for reconstruction, 2,048 for joint retraining); a check on the held-out pairs every
100 steps, and an end where the error is higher than at both checks before.

It omits, in favour of the published code: printing and TensorBoard at every step, saving at every check, and worker
processes for reading (on a CPU they would take cores from training). It also omits the final layer norm, because a
representation here is the input of W_hd.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from reproduction.benchmarks.timing import significant

RECONSTRUCTION_BATCH = 20_480
JOINT_BATCH = 2_048
DROPOUT = 0.2
LEARNING_RATE = 1e-3
CHECK_EVERY = 100
EPOCHS = 200


class PublishedAdapter(nn.Module):
    """Published adapter: y = drop(f) A^T B^T / r and z = drop(f) A^T / r."""

    def __init__(self, d: int, rank: int, dropout: float = DROPOUT) -> None:
        super().__init__()
        self.A = nn.Parameter((torch.rand(rank, d) * 2 - 1) * d**-0.5)
        self.B = nn.Parameter(torch.zeros(d, rank))
        self.scaling = 1 / rank
        self.dropout = nn.Dropout(dropout)

    def forward(self, f: Tensor) -> tuple[Tensor, Tensor]:
        """Return y and z of f: (n, d) -> (n, d), (n, r)."""
        y = (self.dropout(f) @ self.A.T @ self.B.T) * self.scaling
        z = (self.dropout(f) @ self.A.T) * self.scaling
        return y, z


def joint_loss(
    adapter: PublishedAdapter, B_rct: Tensor, W_hd: Tensor, f: Tensor, targets: Tensor, kappa: float
) -> Tensor:
    """Return L = kappa * MSE(B_rct z, f) + (1 - kappa) * CE(W_hd y, targets): f (n, d), targets (n,), W_hd (V, d)."""
    y, z = adapter(f)
    reconstruction = nn.functional.mse_loss((z @ B_rct.T).reshape(-1), f.reshape(-1))
    prediction = nn.functional.cross_entropy(y @ W_hd.T, targets)
    return kappa * reconstruction + (1 - kappa) * prediction


class Rows(Dataset[tuple[Tensor, Tensor]]):
    """Data set of single pairs (representation, target) from float32 and int32 memory maps."""

    def __init__(self, representations: Path, targets: Path, d: int) -> None:
        self.representations = np.memmap(representations, np.float32, "r").reshape(-1, d)
        self.targets = np.memmap(targets, np.int32, "r")

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        return torch.from_numpy(np.array(self.representations[i])), torch.tensor(int(self.targets[i]))


def train_joint(
    rows: Rows, adapter: PublishedAdapter, B_rct: Tensor, W_hd: Tensor, kappa: float, steps: int, batch_size: int
) -> float:
    """Train for `steps` batches, from the first row on, and return the mean loss."""
    adam = torch.optim.Adam(adapter.parameters(), lr=LEARNING_RATE)
    adapter.train()
    total = 0.0
    for f, targets in _endless(DataLoader(rows, batch_size=batch_size), steps):
        adam.zero_grad()
        loss = joint_loss(adapter, B_rct, W_hd, f, targets, kappa)
        total += loss.item()
        loss.backward()  # type: ignore[no-untyped-call]
        adam.step()
    return total / steps


def _endless(loader: DataLoader[tuple[Tensor, Tensor]], steps: int) -> Iterator[tuple[Tensor, Tensor]]:
    done = 0
    while True:
        for batch in loader:
            if done == steps:
                return
            yield batch
            done += 1


@dataclass(frozen=True)
class Procedure:
    """Procedure of learning the reconstruction by gradient descent.

    Attributes:
        batch_size: pairs in a step.
        check_every: steps between two looks at the held-out error; 0 is once an epoch.
        patience: checks in a row without a lower error before it stops; 0 stands for the published rule, an error
            above both before it.
        scaled: divide by r and start B at zero, as LoRA's layer does; otherwise B starts as A does.
        dropout: on the layer's input.
        shuffled: draw the batches anew every epoch.
        epochs: most passes.
    """

    batch_size: int = RECONSTRUCTION_BATCH
    check_every: int = CHECK_EVERY
    patience: int = 0
    scaled: bool = True
    dropout: float = DROPOUT
    shuffled: bool = False
    epochs: int = EPOCHS


PROCEDURES = {
    "published code": Procedure(),
    "paper, at its best": Procedure(256, 0, 3, scaled=False, dropout=0.0, shuffled=True),
}
"""Settings of the published code, and those of the paper's description with the best choices."""


@dataclass
class DescentResult:
    """Result of a gradient descent; errors are means over pairs and entries of (f - B A f)^2."""

    seconds: float
    seconds_to_best: float
    held_out_error: float
    steps: int
    epochs: float
    stopped: str

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-ready values."""
        return asdict(self)


def learn_reconstruction(f: Tensor, held_out: Tensor, rank: int, how: Procedure, limit_seconds: float) -> DescentResult:
    """Run Adam on A and B over f (n, d) in RAM for at most `limit_seconds`; return the best on `held_out` (m, d)."""
    n, d = f.shape
    adapter = PublishedAdapter(d, rank, how.dropout)
    if not how.scaled:
        adapter.scaling = 1.0
        nn.init.uniform_(adapter.B, -(rank**-0.5), rank**-0.5)
    adam = torch.optim.Adam(adapter.parameters(), lr=LEARNING_RATE)
    random = torch.Generator().manual_seed(0)
    steps_an_epoch = -(-n // how.batch_size)
    check_every = how.check_every or steps_an_epoch
    errors: list[float] = []
    best, best_at, step = float("inf"), 0.0, 0
    started = time.perf_counter()

    def check() -> float:
        adapter.eval()
        with torch.no_grad():
            error = float(nn.functional.mse_loss(adapter(held_out)[0], held_out))
        adapter.train()
        return error

    def done(stopped: str) -> DescentResult:
        nonlocal best, best_at
        error = check()
        spent = time.perf_counter() - started
        if error < best:
            best, best_at = error, spent
        return DescentResult(
            significant(spent), significant(best_at), best, step, round(step / steps_an_epoch, 2), stopped
        )

    for _ in range(how.epochs):
        order = torch.randperm(n, generator=random) if how.shuffled else None
        for start in range(0, n, how.batch_size):
            rows = f[start : start + how.batch_size] if order is None else f[order[start : start + how.batch_size]]
            adam.zero_grad()
            y, _ = adapter(rows)
            nn.functional.mse_loss(y.reshape(-1), rows.reshape(-1)).backward()  # type: ignore[no-untyped-call]
            adam.step()
            step += 1
            if step % check_every == 0:
                errors.append(check())
                if errors[-1] < best:
                    best, best_at = errors[-1], time.perf_counter() - started
                if how.patience and len(errors) > how.patience and min(errors[-how.patience :]) > best:
                    return done("early, on the held-out error")
                if not how.patience and len(errors) > 2 and errors[-1] > max(errors[-2], errors[-3]):
                    return done("early, on the held-out error")
            if time.perf_counter() - started > limit_seconds:
                return done(f"cut at {limit_seconds:g} s")
    return done(f"after {how.epochs} epochs")
