"""Pairs in RAM, between the shards on the disk and the batches for training."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pema.devices import move
from pema.memory.pairing import NO_TARGET
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


def copy_rows(source: np.ndarray, rows: Integers | slice, out: np.ndarray) -> None:
    """Copy the given rows of `source` into `out`."""
    if isinstance(rows, slice):
        np.copyto(out, source)
    else:
        # mode "clip" writes directly into `out`, without a buffer; the rows are known to be in range.
        np.take(source, rows, axis=0, out=out, mode="clip")


@dataclass(frozen=True)
class Buffer:
    """A buffer of n pairs in their stored form: in RAM, or the first four of its tensors on an accelerator.

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
    def empty(cls, n: int, d_tap: int, dtype: torch.dtype, *, pinned: bool = False) -> Buffer:
        """Allocate a buffer for n pairs; a `pinned` one is copied to a GPU without an intermediate copy."""
        int8 = dtype == torch.int8
        scales = torch.empty((n, 1), pin_memory=pinned) if int8 else None
        shards = torch.empty(n, dtype=torch.int64, pin_memory=pinned) if int8 else None
        targets = torch.empty(n, dtype=torch.int64, pin_memory=pinned)
        columns = [torch.empty(n, dtype=torch.int64) for _ in range(3)]
        return cls(torch.empty((n, d_tap), dtype=dtype, pin_memory=pinned), scales, shards, targets, *columns)

    @property
    def columns(self) -> list[Tensor]:
        """All tensors except the representations."""
        columns = [self.targets, self.steps, self.lengths, self.rows, self.scales, self.shards]
        return [column for column in columns if column is not None]

    def take(self, which: slice | Tensor) -> Buffer:
        """Select pairs: views for a slice, copies for indices."""
        device = self.representations.device
        there = which if isinstance(which, slice) else move(which, device)

        def select(column: Tensor) -> Tensor:
            index = there if column.device == device else which
            return column[index] if isinstance(index, slice) else column.index_select(0, index)

        scales, shards = (None if column is None else select(column) for column in (self.scales, self.shards))
        columns = (select(self.targets), select(self.steps), select(self.lengths), select(self.rows))
        return Buffer(select(self.representations), scales, shards, *columns)

    @property
    def paired(self) -> Tensor:
        """(n,) bool in RAM, whether each pair has a target."""
        return (self.targets != NO_TARGET).cpu()

    @classmethod
    def joined(cls, buffers: Sequence[Buffer]) -> Buffer:
        """Return the pairs of several buffers in one."""

        def join(name: str) -> Tensor | None:
            columns = [getattr(buffer, name) for buffer in buffers]
            return None if columns[0] is None else torch.cat(columns)

        return cls(**{each.name: join(each.name) for each in fields(cls)})  # type: ignore[arg-type]

    def on(self, device: torch.device) -> Buffer:
        """Return the buffer on an accelerator; a GPU may still be copying a pinned one."""

        def move_one(column: Tensor) -> Tensor:
            return column.to(device, non_blocking=device.type == "cuda")

        scales, shards = (None if column is None else move_one(column) for column in (self.scales, self.shards))
        f, targets = move_one(self.representations), move_one(self.targets)
        return replace(self, representations=f, scales=scales, shards=shards, targets=targets)

    def batch(self, which: slice | Tensor, head: Head | None, channel_scales: Tensor) -> Batch:
        """Return the selected pairs as the adapter's input.

        Args:
            which: the pairs.
            head: the layers between the tap and W_hd; None if there are none.
            channel_scales: (k, d_tap), (0, 0) without int8; on the device of the buffer.
        """
        taken = self.take(which)
        if taken.scales is None or taken.shards is None:
            f = taken.representations.float()
        else:
            by_row = channel_scales[0] if len(channel_scales) == 1 else channel_scales[taken.shards]
            f = restore(taken.representations, taken.scales[:, 0], by_row)
        f = f if head is None else head.normalise(f).float()
        return Batch(f, taken.targets, taken.steps, taken.lengths, taken.rows)


@dataclass(frozen=True)
class Filled:
    """A filled buffer and the places of its batches.

    Attributes:
        buffer: the pairs.
        paired: (n,) bool in RAM, whether each has a target.
        order: (n,) int64, the shuffled places; None: the batches are ranges of the buffer.
        cuts: the batches, as ranges of `order`.
    """

    buffer: Buffer
    paired: Tensor
    order: Tensor | None
    cuts: Sequence[slice]

    def places(self) -> Iterator[slice | Tensor]:
        """Yield the place of each batch in the buffer."""
        for cut in self.cuts:
            yield cut if self.order is None else self.order[cut]

    def on(self, device: torch.device) -> Filled:
        """Return the pairs on an accelerator, in the order of their batches."""
        buffer, paired = self.buffer.on(device), self.paired
        if self.order is not None:
            buffer, paired = buffer.take(self.order), paired[self.order]
        return Filled(buffer, paired, None, self.cuts)


def moved(fills: Iterator[Filled], device: torch.device) -> Iterator[Filled]:
    """Yield buffers on an accelerator, in the order of their batches, copied beside what it computes."""
    stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
    for filled in fills:
        if stream is None:
            yield filled.on(device)
            continue
        with torch.cuda.device(device), torch.cuda.stream(stream):
            there = filled.on(device)
            stream.synchronize()  # the next buffer may be filled into the same memory
        for tensor in (there.buffer.representations, there.buffer.targets, there.buffer.scales, there.buffer.shards):
            if tensor is not None:  # its memory is not free before the batches have been computed
                tensor.record_stream(torch.cuda.default_stream(device))
        yield there


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
