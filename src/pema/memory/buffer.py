"""Pairs in RAM, between the shards on the disk and the batches for training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pema.memory.shard import Integers, restore
from pema.owner.head import Head
from pema.processes import Processes

Flags = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Batch:
    """A batch of b pairs.

    Representations and targets are on the device of the view, the rest is on the CPU.

    Attributes:
        representations: (b, d) float32, the input of W_hd (after the final norm and the projection).
        targets: (b,) int64, y.
        steps: (b,) int64, t = 0, 1, ...: the position of each target in its example.
        source_lengths: (b,) int64, SL, the number of tokens of each example's source.
        rows: (b,) int64, the place of each pair in the memory.
    """

    representations: Tensor
    targets: Tensor
    steps: Tensor
    source_lengths: Tensor
    rows: Tensor


@dataclass(frozen=True)
class Part:
    """One process's part of a batch of b pairs.

    Attributes:
        batch: the pairs of this process; there may be none.
        first: place of the first of them in the batch.
        rows: (b,) int64, the place in the memory of each pair of the whole batch.
    """

    batch: Batch
    first: int
    rows: Tensor

    @property
    def weight(self) -> float:
        """Return the share of the batch's pairs that this process has."""
        return len(self.batch.targets) / len(self.rows)


def moved(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a tensor of the CPU on a device, which copies it while the program goes on."""
    if device.type != "cuda":
        return tensor.to(device)
    with torch.cuda.device(device):  # pinned memory belongs to the current device of a thread
        return tensor.pin_memory().to(device, non_blocking=True)


def copy_rows(source: np.ndarray, rows: Integers | slice, out: np.ndarray) -> None:
    """Copy the given rows of `source` into `out`."""
    if isinstance(rows, slice):
        np.copyto(out, source)
    else:
        # mode "clip" writes directly into `out`, without a buffer; the rows are known to be in range.
        np.take(source, rows, axis=0, out=out, mode="clip")


@dataclass(frozen=True)
class Buffer:
    """A buffer of n pairs in RAM, in their stored form.

    Attributes:
        representations: (n, d_tap) in the memory's dtype.
        scales: (n, 1) float32; only for int8.
        shards: (n,) int64, row of the memory's channel scales; only for int8.
        targets: (n,) int64.
        steps: (n,) int64.
        lengths: (n,) int64, the source lengths.
        rows: (n,) int64, the places in the memory.
    """

    representations: Tensor
    scales: Tensor | None
    shards: Tensor | None
    targets: Tensor
    steps: Tensor
    lengths: Tensor
    rows: Tensor

    @classmethod
    def empty(cls, n: int, d_tap: int, dtype: torch.dtype) -> Buffer:
        """Allocate a buffer for n pairs."""
        int8 = dtype == torch.int8
        scales, shards = (torch.empty((n, 1)), torch.empty(n, dtype=torch.int64)) if int8 else (None, None)
        columns = [torch.empty(n, dtype=torch.int64) for _ in range(4)]
        return cls(torch.empty((n, d_tap), dtype=dtype), scales, shards, *columns)

    @property
    def columns(self) -> list[Tensor]:
        """All tensors except the representations."""
        columns = [self.targets, self.steps, self.lengths, self.rows, self.scales, self.shards]
        return [column for column in columns if column is not None]

    def take(self, which: slice | Tensor) -> Buffer:
        """Select pairs: views for a slice, copies for indices."""

        def select(column: Tensor) -> Tensor:
            return column[which] if isinstance(which, slice) else column.index_select(0, which)

        scales, shards = (None if column is None else select(column) for column in (self.scales, self.shards))
        columns = (select(self.targets), select(self.steps), select(self.lengths), select(self.rows))
        return Buffer(select(self.representations), scales, shards, *columns)

    def batch(self, which: slice | Tensor, head: Head | None, channel_scales: Tensor) -> Batch:
        """Return the selected pairs as the adapter's input.

        Args:
            which: the pairs.
            head: the layers between the tap and W_hd; None if there are none.
            channel_scales: (k, d_tap), (0, 0) without int8; the pairs are moved, as stored, to their device.
        """
        taken, device = self.take(which), channel_scales.device
        f = moved(taken.representations, device)
        if taken.scales is None or taken.shards is None:
            f = f.float()
        else:
            by_row = channel_scales[0] if len(channel_scales) == 1 else channel_scales[moved(taken.shards, device)]
            f = restore(f, moved(taken.scales[:, 0], device), by_row)
        f = f if head is None else head.normalise(f).float()
        return Batch(f, moved(taken.targets, device), taken.steps, taken.lengths, taken.rows)


def needed(cuts: Sequence[slice], order: Tensor | None, n: int, processes: Processes) -> Flags:
    """Return which of a buffer's n rows this process needs: its parts of the batches, and the rows in none of these.

    Args:
        cuts: the batches, as ranges of `order`.
        order: (n,) the rows in the order of the batches; None: as they are.
        n: number of rows.
        processes: the processes, seen from this one.
    """
    rows = np.arange(n) if order is None else order.numpy()
    own = np.ones(n, bool)
    for cut in cuts:
        batch = rows[cut]
        own[batch] = False
        own[batch[processes.part(len(batch))]] = True
    return own
