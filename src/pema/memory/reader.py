"""Reader of external memories: memory-mapped, in blocks, shuffled, in bounded RAM."""

from __future__ import annotations

import copy
import functools
import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pema.devices import is_asynchronous
from pema.errors import ExternalMemoryError
from pema.memory.buffer import Batch, Buffer, Filled, Flags, Part, copy_rows, moved, needed
from pema.memory.manifest import HEAD, RESTORE, Manifest
from pema.memory.pairing import NO_TARGET
from pema.memory.places import MEMORY
from pema.memory.prefetch import prefetch
from pema.memory.prompts import Prompts
from pema.memory.shard import DTYPES, Integers, ShardFile
from pema.owner.head import Head
from pema.processes import ALONE, Processes
from pema.schema import require
from pema.storage.fetching import local
from pema.tasks.held_out import draw_held_out, spread

CPU = torch.device("cpu")

BUFFER_BYTES = 1 << 26
"""Maximum bytes of stored representations in RAM for shuffling."""

UNSHUFFLED_BYTES = 1 << 22
"""The same without shuffling: small enough for a processor's cache."""

RESIDENT = 0.25
"""Maximum share of a GPU's free memory that the pairs of a memory take, to be read from the disk only once."""

AT_ONCE = 1 << 12
"""Number of pairs that are copied to a GPU at a time if all are."""

BLOCKS_PER_BUFFER = 32
"""Number of parts of the memory that a shuffled buffer mixes."""


class Memory:
    """A complete memory on the disk.

    Opening reads the manifest and the sizes and headers of the files; `pema.memory.verify.verify` reads every byte.
    """

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path = path
        self.manifest = manifest
        self.shards = [ShardFile(path, entry, manifest) for entry in manifest.shards]

    def __repr__(self) -> str:
        plm, contexts = self.manifest.plm.name, self.manifest.contexts
        return f"Memory({str(self.path)!r}: {self.examples:,} examples, {self.pairs:,} pairs, {contexts}, {plm})"

    @classmethod
    def open(cls, path: Path | str) -> Memory:
        """Open the memory at `path`; one at an address is copied to the local disk first (`pema.storage`).

        Raises:
            ExternalMemoryError: there is none, it is incomplete or of another version; a file is missing or truncated,
                or its header does not match the manifest.
            OwnerError, MismatchError: the head bundle's settings or header are invalid.
            StorageError: the storage cannot be read, or what it has is damaged.
        """
        path = local(path, MEMORY)
        memory = cls(path, Manifest.open(path))
        memory._require_shape(*Head.stored_shape(path / HEAD))
        for shard in memory.shards:
            _ = shard.starts
        return memory

    def _require_shape(self, V: int, d: int, d_tap: int) -> None:
        plm = self.manifest.plm
        if (V, d, d_tap) != (plm.vocabulary_size, plm.d, plm.d_tap):
            raise ExternalMemoryError(
                f"{self.path / HEAD} is not the head of {plm.name}: its (V, d, d_tap) are {(V, d, d_tap)}, "
                f"expected {(plm.vocabulary_size, plm.d, plm.d_tap)}: {RESTORE}"
            )

    @property
    def pairs(self) -> int:
        """Number of (f(c_i), y_i) pairs."""
        return self.manifest.pairs

    @property
    def examples(self) -> int:
        """Number of examples."""
        return self.manifest.examples

    @property
    def bytes(self) -> int:
        """Size of the shards on the disk, in bytes."""
        return self.manifest.bytes

    @property
    def d(self) -> int:
        """Width of the head's input, and of the representations in a `Batch`."""
        return self.manifest.plm.d

    def head(self, dtype: torch.dtype | None = None) -> Head:
        """Load the head bundle stored next to the shards.

        Args:
            dtype: type that W_hd is cast to while it is read; None keeps the stored type.

        Raises:
            OwnerError, MismatchError: it is damaged.
            ExternalMemoryError: it is not the head of the memory's PLM.
        """
        head = Head.load(self.path / HEAD, dtype)
        if head.fingerprint != self.manifest.plm.head_fingerprint:
            raise ExternalMemoryError(
                f"{self.path / HEAD} is not the head of {self.manifest.plm.name} (its fingerprint differs): {RESTORE}"
            )
        self._require_shape(head.vocabulary_size, head.d, head.d_tap)
        return head

    @functools.cached_property
    def _normaliser(self) -> Head | None:
        """The layers between the tap and W_hd, as a head without rows of W_hd; None if there are none."""
        if self.manifest.plm.tap == "head_input":
            return None
        # A copy, so that the file of the bundle is no longer mapped.
        return copy.deepcopy(self.head().subset(torch.empty(0, dtype=torch.int64)))

    @functools.cached_property
    def _channel_scales(self) -> tuple[Tensor, list[int]]:
        """The distinct channel scales, (k, d_tap), and the row of each shard; (0, 0) without int8."""
        kinds: dict[bytes, int] = {}
        rows, which = [torch.empty(0, 0)], []
        for shard in self.shards:
            scales = shard.channel_scales
            if scales is not None:
                key = scales.numpy().tobytes()
                if key not in kinds:
                    kinds[key] = len(kinds)
                    rows.append(scales[None])
                which.append(kinds[key])
        return torch.cat(rows[1:] or rows), which

    @functools.cached_property
    def _first_examples(self) -> Integers:
        """(shards + 1,): number of the first example of each shard."""
        return np.concatenate([[0], np.cumsum([entry.examples for entry in self.manifest.shards])]).astype(np.int64)

    @functools.cached_property
    def _first_rows(self) -> Integers:
        """(shards + 1,): place of the first pair of each shard."""
        return np.concatenate([[0], np.cumsum([entry.pairs for entry in self.manifest.shards])]).astype(np.int64)

    @functools.cached_property
    def prompts(self) -> Prompts:
        """The tokens of all contexts.

        Raises:
            ExternalMemoryError: they are not stored, of another version, or damaged.
        """
        for shard in self.shards:
            if shard.entry.prompts is None:
                raise ExternalMemoryError(
                    f"{self.path} does not contain its prompts, because an earlier version of pema built (a part of) "
                    "it: build it again, or train with --preset residual."
                )
        return Prompts(self.shards)

    def view(self) -> View:
        """Return a view of all pairs."""
        return View(self, None)

    def resident(self, device: torch.device) -> Buffer | None:
        """Copy all pairs to a GPU, from which the batches of views then take them.

        Returns:
            The pairs, in order; None on another device, or if they take more than `RESIDENT` of its free memory.
        """
        if device.type != "cuda" or self.pairs * self._row_bytes > RESIDENT * torch.cuda.mem_get_info(device)[0]:
            return None
        fills = self.view()._fills(AT_ONCE, None, BUFFER_BYTES, device, ALONE)
        return Buffer.joined([filled.buffer.take(which) for filled in fills for which in filled.places()])

    @property
    def _row_bytes(self) -> int:
        """Bytes of a stored representation."""
        return self.manifest.plm.d_tap * DTYPES[self.manifest.dtype].itemsize

    def split(self, dev_fraction: float, seed: int) -> tuple[View, View]:
        """Split the examples at random into a training view and a held-out view.

        Args:
            dev_fraction: fraction of examples to hold out; see `draw_held_out`. Examples of one source stay together.
            seed: the same seed draws the same examples.

        Returns:
            The training view and the held-out view.

        Raises:
            ConfigError: the fraction is not between 0 and 1, or there is only one example or source.
        """
        train, held_out = draw_held_out(self.examples, dev_fraction, seed, str(self.path), self._sources())
        return View(self, train), View(self, held_out)

    def _sources(self) -> Integers | None:
        """Return (e,) equal numbers for examples of one source; None if all sources differ."""
        if any(entry.policy for entry in self.manifest.inputs):  # the same examples several times, with other texts
            return self.prompts.numbers()
        if not any(shard.entry.sources for shard in self.shards):
            return None
        first, numbers = 0, []
        for shard in self.shards:
            sources = shard.sources
            numbers.append(np.arange(first, first + shard.entry.examples) if sources is None else sources)
            first += shard.entry.examples
        return np.concatenate(numbers)


@dataclass(frozen=True)
class _Block:
    """A run of selected examples of one shard.

    Attributes:
        shard: number of the shard.
        examples: (k,) indices of the examples inside the shard, ascending.
        pairs: number of their rows.
    """

    shard: int
    examples: Integers
    pairs: int


@dataclass(frozen=True)
class _Plan:
    """What is read into a buffer after the rest of the one before, and its batches.

    Attributes:
        blocks: what is read.
        following: what is read next.
        pairs: n, number of pairs with that rest.
        order: (n,) int64, the shuffled places; None: as they are.
        cuts: the batches, as ranges of `order`.
    """

    blocks: Sequence[_Block]
    following: Sequence[_Block]
    pairs: int
    order: Tensor | None
    cuts: Sequence[slice]

    @property
    def stop(self) -> int:
        """End of the last batch: what follows is the rest."""
        return self.cuts[-1].stop if self.cuts else 0


def _with_targets(filled: Filled) -> Iterator[slice | Tensor]:
    """Yield the batches without contexts that have no target, and without batches of these only."""
    for which in map(_places, filled.places()):
        chosen = which[filled.paired[which]]
        if len(chosen):
            yield chosen


def _places(which: slice | Tensor) -> Tensor:
    return torch.arange(which.start, which.stop) if isinstance(which, slice) else which


class View:
    """A subset of a memory's examples.

    Attributes:
        memory: the memory.
        selected: (e,) indices of the examples, ascending; None means all.
    """

    def __init__(self, memory: Memory, selected: Integers | None) -> None:
        self.memory = memory
        self.selected = selected

    def _examples(self, shard: int) -> Integers:
        """Return the indices, inside the shard, of the examples in this view."""
        first, stop = self.memory._first_examples[shard : shard + 2]
        if self.selected is None:
            return np.arange(stop - first)
        low, high = np.searchsorted(self.selected, [first, stop])
        examples: Integers = self.selected[low:high] - first
        return examples

    @property
    def examples(self) -> int:
        """Number of examples in the view."""
        return self.memory.examples if self.selected is None else len(self.selected)

    @functools.cached_property
    def pairs(self) -> int:
        """Number of pairs in the view."""
        if self.selected is None:
            return self.memory.pairs
        lengths = [np.diff(file.example_offsets)[self._examples(k)].sum() for k, file in enumerate(self.memory.shards)]
        return int(sum(lengths))

    def spread(self, pairs: int) -> View:
        """Return a view of about `pairs` of these pairs, in examples that are evenly spaced; this one if smaller."""
        if self.pairs <= pairs:
            return self
        examples = np.arange(self.memory.examples) if self.selected is None else self.selected
        return View(self.memory, examples[spread(len(examples), max(len(examples) * pairs // self.pairs, 1))])

    def target_counts(self) -> Tensor:
        """Return how often each token is a target, (V,) int64."""
        counts = np.zeros(self.memory.manifest.plm.vocabulary_size, np.int64)
        for block in self._blocks(1 << 20):
            targets = self.memory.shards[block.shard].targets(*self._span(block))[self._rows(block)]
            counts += np.bincount(targets[targets != NO_TARGET], minlength=len(counts))
        return torch.from_numpy(counts)

    def targets_seen(self) -> Tensor:
        """Return the target tokens that occur, (k,) int64, sorted."""
        return self.target_counts().nonzero()[:, 0]

    def batches(
        self,
        batch_size: int,
        *,
        shuffle_seed: int | None = None,
        buffer_bytes: int = BUFFER_BYTES,
        device: torch.device = CPU,
        resident: Buffer | None = None,
    ) -> Iterator[Batch]:
        """Yield every pair once, in batches of `batch_size`; the last one may be smaller.

        Contexts without a target (`matched`) are left out, so batches of them are smaller.

        Shuffling is block-wise: the blocks of all shards are put into a random order, several of them at a time fill a
        buffer, and the pairs in the buffer are shuffled. RAM is bounded by the buffer, not by the memory.

        Args:
            batch_size: pairs per batch.
            shuffle_seed: the same seed gives the same order; None keeps the order of the memory.
            buffer_bytes: size of the shuffled buffer in stored bytes.
            device: device of the representations and the targets, which restores the stored form.
            resident: all pairs of the memory on the device, by `Memory.resident`, if they are there.

        Raises:
            ConfigError: `batch_size` is below 1.
            ExternalMemoryError: a shard is damaged.
        """
        require("batch_size", batch_size, int, least=1)
        require("shuffle_seed", shuffle_seed, int | None, least=0)
        head, channel_scales = self._restoring(device)
        every = self.memory.manifest.targets != "matched"
        return (
            filled.buffer.batch(which, head, channel_scales)
            for filled in self._fills(batch_size, shuffle_seed, buffer_bytes, device, ALONE, resident)
            for which in (filled.places() if every else _with_targets(filled))
        )

    def parts(
        self,
        batch_size: int,
        processes: Processes,
        *,
        shuffle_seed: int | None = None,
        buffer_bytes: int = BUFFER_BYTES,
        device: torch.device = CPU,
        resident: Buffer | None = None,
    ) -> Iterator[Part]:
        """Yield one process's part of each batch of `batches`, which are the same for any number of processes.

        Every pair is in the part of one process. The representations of the others' pairs are not read, except those
        at the end of a shuffled buffer, fewer than `batch_size`, which are in one of the next buffer's batches.

        Args:
            batch_size: pairs per batch of all processes together.
            processes: the processes, seen from this one.
            shuffle_seed: see `batches`.
            buffer_bytes: see `batches`.
            device: see `batches`.
            resident: see `batches`; for one process.
        """
        if processes.count == 1:
            for batch in self.batches(
                batch_size, shuffle_seed=shuffle_seed, buffer_bytes=buffer_bytes, device=device, resident=resident
            ):
                yield Part(batch, 0, batch.rows)
            return
        head, channel_scales = self._restoring(device)
        for filled in self._fills(batch_size, shuffle_seed, buffer_bytes, device, processes):
            for places in map(_places, filled.places()):
                cut, exists = processes.part(len(places)), filled.paired[places]
                if bool(exists.any()):
                    own = places[cut][exists[cut]]
                    first = int(exists[: cut.start].sum())
                    batch = filled.buffer.batch(own, head, channel_scales)
                    yield Part(batch, first, filled.buffer.rows[places[exists]])

    def share(self, processes: Processes) -> View:
        """Return one process's part of the view: consecutive examples, about as many as the others' parts."""
        if processes.count == 1:
            return self
        selected = np.arange(self.memory.examples) if self.selected is None else self.selected
        return View(self.memory, selected[processes.part(len(selected))])

    def _restoring(self, device: torch.device) -> tuple[Head | None, Tensor]:
        """Return what turns stored pairs into the adapter's input, on a device: see `Buffer.batch`."""
        head, channel_scales = self.memory._normaliser, self.memory._channel_scales[0]
        if head is not None and device.type != "cpu":
            head = copy.deepcopy(head).to(device)  # a module moves in place
        return head, channel_scales.to(device)

    def _fills(
        self,
        batch_size: int,
        shuffle_seed: int | None,
        buffer_bytes: int,
        device: torch.device,
        processes: Processes,
        resident: Buffer | None = None,
    ) -> Iterator[Filled]:
        """Yield the filled buffers on a device; an accelerator computes on one while the next is prepared."""
        shuffle = None if shuffle_seed is None else np.random.default_rng(shuffle_seed)
        buffer_bytes = min(buffer_bytes, UNSHUFFLED_BYTES) if shuffle is None else buffer_bytes
        groups = self._grouped(max(buffer_bytes // self.memory._row_bytes, batch_size), shuffle)
        plans = self._planned(groups, batch_size, shuffle)
        if resident is not None:
            return prefetch(self._taken(plans, resident))
        sizes = (sum(block.pairs for block in group) for group in groups)
        largest = 0 if shuffle is None else max(sizes, default=0) + batch_size
        fills = self._filled(plans, processes, largest, pinned=device.type == "cuda")
        return prefetch(moved(fills, device)) if is_asynchronous(device) else fills

    def _grouped(self, buffer_pairs: int, shuffle: np.random.Generator | None) -> list[list[_Block]]:
        """Return what is read into each buffer."""
        blocks = list(self._blocks(buffer_pairs if shuffle is None else max(buffer_pairs // BLOCKS_PER_BUFFER, 1)))
        if shuffle is not None:
            blocks = [blocks[i] for i in shuffle.permutation(len(blocks))]
        fills: list[list[_Block]] = []
        free = 0
        for block in blocks:
            if block.pairs > free:
                fills.append([])
                free = buffer_pairs
            fills[-1].append(block)
            free -= block.pairs
        return fills

    def _planned(
        self, groups: Sequence[Sequence[_Block]], batch_size: int, shuffle: np.random.Generator | None
    ) -> Iterator[_Plan]:
        """Yield how each buffer is filled, and where in it the batches are."""
        rest = 0
        for group, following in itertools.zip_longest(groups, groups[1:], fillvalue=()):
            n = rest + sum(block.pairs for block in group)
            order = None if shuffle is None else torch.from_numpy(shuffle.permutation(n))
            stop = n - n % batch_size if following else n
            cuts = [slice(first, min(first + batch_size, stop)) for first in range(0, stop, batch_size)]
            yield _Plan(group, following, n, order, cuts)
            rest = n - stop

    def _taken(self, plans: Iterable[_Plan], resident: Buffer) -> Iterator[Filled]:
        """Yield the filled buffers, whose pairs are on the device already."""
        rest, paired = torch.empty(0, dtype=torch.int64), resident.paired
        for plan in plans:
            rows = torch.cat([rest, *(torch.from_numpy(self._in_memory(block)) for block in plan.blocks)])
            rows = rows if plan.order is None else rows[plan.order]
            yield Filled(resident.take(rows), paired[rows], None, plan.cuts)
            rest = rows[plan.stop :]

    def _filled(self, plans: Iterable[_Plan], processes: Processes, largest: int, *, pinned: bool) -> Iterator[Filled]:
        """Yield the filled buffers in RAM; of the representations only this process's part is there.

        What is yielded is read before the next buffer is filled, so one for the `largest` is reused if its pairs are
        shuffled: batches are then copies.
        """
        reused = self._allocate(largest, pinned) if largest else None
        rest: Buffer | None = None
        for plan in plans:
            for block in plan.following:
                self.memory.shards[block.shard].read_ahead(*self._span(block))
            n, order = plan.pairs, plan.order
            buffer = self._allocate(n, pinned) if reused is None else reused.take(slice(n))
            own = None if processes.count == 1 else needed(plan.cuts, order, n, processes)
            self._fill(buffer, plan.blocks, rest, own)
            yield Filled(buffer, buffer.paired, order, plan.cuts)
            rest = buffer.take(torch.arange(plan.stop, n) if order is None else order[plan.stop :])

    def _blocks(self, pairs: int) -> Iterator[_Block]:
        """Split the view into runs of about `pairs` pairs, none across shards."""
        for shard, file in enumerate(self.memory.shards):
            examples = self._examples(shard)
            if not len(examples):
                continue
            filled = np.concatenate([[0], np.cumsum(np.diff(file.example_offsets)[examples])])
            number = filled[:-1] // pairs
            cuts = np.concatenate([[0], np.flatnonzero(np.diff(number)) + 1, [len(examples)]])
            for low, high in itertools.pairwise(cuts):
                yield _Block(shard, examples[low:high], int(filled[high] - filled[low]))

    def _span(self, block: _Block) -> tuple[int, int]:
        """Return the row range [start, stop) of the shard from a block's first to its last example."""
        offsets = self.memory.shards[block.shard].example_offsets
        return int(offsets[block.examples[0]]), int(offsets[block.examples[-1] + 1])

    def _rows(self, block: _Block) -> Integers | slice:
        """Return the block's rows inside its span."""
        first, last = self._span(block)
        if last - first == block.pairs:
            return slice(None)
        offsets = self.memory.shards[block.shard].example_offsets
        starts, stops = offsets[block.examples], offsets[block.examples + 1]
        return np.repeat(starts - first, stops - starts) + self._steps(block)

    def _in_memory(self, block: _Block) -> Integers:
        """Return the places of the block's rows in the memory."""
        places: Integers = (self.memory._first_rows[block.shard] + np.arange(*self._span(block)))[self._rows(block)]
        return places

    def _steps(self, block: _Block) -> Integers:
        """Return the positions t of the block's rows."""
        offsets = self.memory.shards[block.shard].example_offsets
        lengths = offsets[block.examples + 1] - offsets[block.examples]
        steps: Integers = np.arange(block.pairs) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        return steps

    def _allocate(self, n: int, pinned: bool) -> Buffer:
        """Allocate a buffer for n pairs."""
        manifest = self.memory.manifest
        return Buffer.empty(n, manifest.plm.d_tap, DTYPES[manifest.dtype], pinned=pinned)

    def _fill(self, buffer: Buffer, blocks: Sequence[_Block], rest: Buffer | None, own: Flags | None) -> None:
        """Fill a buffer with the rest of the previous buffer, then with blocks; `own`: the rows that are needed."""
        kept = 0 if rest is None else len(rest.targets)
        if rest is not None:
            buffer.representations[:kept] = rest.representations
            for column, previous in zip(buffer.columns, rest.columns, strict=True):
                column[:kept] = previous
        rows = buffer.representations.view(torch.uint8).numpy()
        targets, steps, source_lengths, places = (
            column.numpy() for column in (buffer.targets, buffer.steps, buffer.lengths, buffer.rows)
        )
        at = kept
        for block in blocks:
            file = self.memory.shards[block.shard]
            first, last = self._span(block)
            chosen = self._rows(block)
            here = slice(at, at + block.pairs)
            stored = file.window("representations", first, last)
            if own is None:
                copy_rows(stored, chosen, rows[here])
            else:
                which = np.flatnonzero(own[here])
                rows[at + which] = stored[which if isinstance(chosen, slice) else chosen[which]]
            if buffer.scales is not None and buffer.shards is not None:
                copy_rows(file.window("scales", first, last), chosen, buffer.scales.view(torch.uint8).numpy()[here])
                buffer.shards[here] = self.memory._channel_scales[1][block.shard]
            targets[here] = file.targets(first, last)[chosen]
            steps[here] = self._steps(block)
            places[here] = self._in_memory(block)
            lengths = file.example_offsets[block.examples + 1] - file.example_offsets[block.examples]
            source_lengths[here] = np.repeat(file.source_lengths[block.examples], lengths)
            at += block.pairs
