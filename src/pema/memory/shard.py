"""Shards: the pairs of consecutive examples in one safetensors file."""

from __future__ import annotations

import functools
import hashlib
import mmap
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import safetensors.torch
import torch
from torch import Tensor

from pema.errors import ConfigError, DataError, ExternalMemoryError
from pema.files import open_regular, sha256, writing
from pema.memory.config import Dtype
from pema.memory.manifest import PROMPTS_VERSION, RESTORE, Manifest, PromptsEntry, ShardEntry, file_name
from pema.memory.pairing import NO_TARGET
from pema.tensors import BYTES, read_header

Integers = npt.NDArray[np.int64]

DTYPES: dict[Dtype, torch.dtype] = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "int8": torch.int8,
}
AT_ONCE = 1024
"""Number of representations converted at a time where that takes wider copies of them."""

_STORED = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "int8": "I8"}


@dataclass(frozen=True)
class StoredPrompts:
    """The prompts of e examples with n pairs, as token ids.

    Attributes:
        tokens: (p,) int32, the tokens of all prompts.
        spellings: (p,) int32, the token that writes `spans` tokens from here after a space, or -1; see
            `pema.tasks.spelling`.
        spans: (p,) uint8.
        offsets: (e + 1,) int64, first token of each prompt, and p.
        written: (n,) int32, the token that the PLM generated after each `predicted` context; None for `teacher`
            contexts, where it is the target.
    """

    tokens: npt.NDArray[np.int32]
    spellings: npt.NDArray[np.int32]
    spans: npt.NDArray[np.uint8]
    offsets: Integers
    written: npt.NDArray[np.int32] | None

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors by their names in the file."""
        values = {
            "prompt_tokens": self.tokens,
            "prompt_spellings": self.spellings,
            "prompt_spans": self.spans,
            "prompt_offsets": self.offsets,
            "written": self.written,
        }
        return {name: torch.from_numpy(value) for name, value in values.items() if value is not None}

    def select(self, examples: Integers, rows: Integers) -> StoredPrompts:
        """Return the prompts of some examples (k,), whose pairs are `rows`."""
        lengths = self.offsets[examples + 1] - self.offsets[examples]
        ends = np.cumsum(lengths)
        places = np.repeat(self.offsets[examples] - (ends - lengths), lengths) + np.arange(ends[-1])
        return StoredPrompts(
            self.tokens[places],
            self.spellings[places],
            self.spans[places],
            np.concatenate([[0], ends]),
            None if self.written is None else self.written[rows],
        )


@dataclass(frozen=True)
class Contents:
    """The content of a shard: n pairs of e examples.

    Attributes:
        representations: (n, d_tap) in the memory's dtype.
        scales: (n,) float32, only for int8: row i represents representations[i] * scales[i] * channel_scales.
        channel_scales: (d_tap,) float32, only for int8.
        targets: (n,) int32, the gold token of each pair.
        example_offsets: (e + 1,) int64; example j has the rows [example_offsets[j], example_offsets[j + 1]), ordered by
            position t = 0, 1, ...
        source_lengths: (e,) int32, number of tokens of each example's source.
        agreeing: not in the file: see `ShardEntry`.
        on_policy: not in the file: see `ShardEntry`.
        sources: (e,) int64, equal for examples of one source; None if all sources differ.
        prompts: the tokens of the contexts; None in memories of earlier versions.
    """

    representations: Tensor
    scales: Tensor | None
    targets: Tensor
    example_offsets: Tensor
    source_lengths: Tensor
    channel_scales: Tensor | None = None
    agreeing: int | None = None
    on_policy: bool = False
    sources: Tensor | None = None
    prompts: StoredPrompts | None = None

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors by their names in the file."""
        values = {
            "representations": self.representations,
            "targets": self.targets,
            "example_offsets": self.example_offsets,
            "source_lengths": self.source_lengths,
        }
        if self.scales is not None and self.channel_scales is not None:
            values |= {"scales": self.scales, "channel_scales": self.channel_scales}
        if self.sources is not None:
            values["sources"] = self.sources
        if self.prompts is not None:
            values |= self.prompts.tensors()
        return values


class DamagedShardError(ExternalMemoryError):
    """A shard whose content does not match the manifest.

    Attributes:
        why: what is wrong.
    """

    def __init__(self, path: Path, why: str) -> None:
        super().__init__(f"{path} is damaged ({why}): {RESTORE}")
        self.why = why


def channel_scales_of(f: Tensor) -> Tensor:
    """Return the root mean square of each component over some representations; 1 for a component that is always 0.

    Representations have outlier components, a hundred times larger than the others in nearly every row (Dettmers et al.
    2022, "LLM.int8()", section 3). Dividing by these scales brings all components to the same magnitude, so that one
    scale per row is enough.

    Args:
        f: (n, d_tap).

    Returns:
        (d_tap,) float32.
    """
    # In parts, because the rows of a shard in float64 are four times as large as stored.
    squares = f.new_zeros(f.shape[1], dtype=torch.float64)
    for rows in torch.split(f, AT_ONCE):
        squares += rows.double().square().sum(0)
    scales = (squares / len(f)).sqrt().float()
    return torch.where(scales > 0, scales, 1.0).clamp(torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max)


def store(
    f: Tensor, dtype: Dtype, where: Callable[[int], str], channel_scales: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Convert representations to their storage type.

    int8 is symmetric with one scale per row and one per component: with u = f / channel_scales, scale = max|u| / 127
    and stored value = round(u / scale); the error of component j is at most scale * channel_scales[j] / 2.

    Args:
        f: (n, d_tap), any floating dtype.
        dtype: the memory's dtype.
        where: returns the name of the example that a row belongs to, for the message.
        channel_scales: (d_tap,), for int8.

    Returns:
        The stored rows (n, d_tap), and for int8 the scales (n,) float32.

    Raises:
        DataError: a representation contains NaN or infinity.
        ConfigError: a value is too large for `dtype`.
    """
    scales: Tensor | None = None
    if channel_scales is not None:
        stored, scales = f.new_empty(f.shape, dtype=torch.int8), f.new_empty(len(f), dtype=torch.float32)
        for start in range(0, len(f), AT_ONCE):
            here = slice(start, start + AT_ONCE)
            u = f[here].float() / channel_scales
            scales[here] = u.abs().amax(1) / 127
            u /= scales[here].clamp_min(torch.finfo(torch.float32).tiny)[:, None]
            stored[here] = u.round_().clamp_(-127, 127).to(torch.int8)
    else:
        stored = f.to(DTYPES[dtype])
    # NaN is the largest and the smallest value. This is far faster than a mark for each value, of which few need one.
    checked = stored if scales is None else scales
    if len(f) and not all(torch.isfinite(torch.stack(torch.aminmax(checked)))):
        finite = torch.isfinite(checked)
        broken = torch.isfinite(f).all(1).logical_not().nonzero()
        if len(broken):
            raise DataError(
                f"{where(int(broken[0]))}: the PLM's representation contains NaN or infinity. "
                f"Leave this example out, or load the PLM in float32."
            )
        row = int(finite.reshape(len(finite), -1).all(1).logical_not().nonzero()[0])
        most = torch.finfo(torch.float32 if dtype == "int8" else DTYPES[dtype]).max
        raise ConfigError(
            f"{where(row)}: a representation reaches {float(f[row].abs().max()):.4g}, more than the maximum of "
            f"{dtype} ({most:.4g}): use dtype bfloat16, int8 or float32."
        )
    return stored, scales


def restore(stored: Tensor, scales: Tensor | None, channel_scales: Tensor | None = None) -> Tensor:
    """Convert stored rows back to representations (n, d_tap) in float32.

    Args:
        stored: (n, d_tap).
        scales: (n,), for int8.
        channel_scales: (d_tap,), or (n, d_tap) if the rows come from several shards, for int8.
    """
    f = stored.float()
    return f if scales is None or channel_scales is None else f.mul_(scales[:, None]).mul_(channel_scales)


def write_shard(folder: Path, index: int, contents: Contents) -> ShardEntry:
    """Write shard number `index` into `folder`, atomically.

    Raises:
        StorageError: the write failed.
    """
    entry, data = packed(index, contents)
    write_packed(folder, entry, data)
    return entry


def packed(index: int, contents: Contents) -> tuple[ShardEntry, bytes]:
    """Return the entry and the bytes of shard number `index`."""
    data = safetensors.torch.save(contents.tensors())
    entry = ShardEntry(
        file=file_name(index),
        bytes=len(data),
        sha256=hashlib.sha256(data).hexdigest(),
        pairs=len(contents.targets),
        examples=len(contents.source_lengths),
        agreeing=contents.agreeing,
        on_policy=contents.on_policy,
        sources=contents.sources is not None,
        prompts=None if contents.prompts is None else PromptsEntry(PROMPTS_VERSION, len(contents.prompts.tokens)),
    )
    return entry, data


def write_packed(folder: Path, entry: ShardEntry, data: bytes) -> None:
    """Write the bytes of a shard into `folder`, atomically.

    Raises:
        StorageError: the write failed.
    """
    with writing(folder / entry.file, private=True) as temporary:
        temporary.write_bytes(data)


class ShardFile:
    """A reader of one shard, through memory maps that last only as long as a call.

    No map is kept, so neither the resident size nor the address space grows with the memory.
    """

    def __init__(self, folder: Path, entry: ShardEntry, manifest: Manifest) -> None:
        self.path = folder / entry.file
        self.entry = entry
        self.vocabulary_size, self.max_length = manifest.plm.vocabulary_size, manifest.plm.max_length
        self._least_target = NO_TARGET if manifest.targets == "matched" else 0
        n, e = entry.pairs, entry.examples
        self.layout: dict[str, tuple[str, list[int]]] = {
            "representations": (_STORED[manifest.dtype], [n, manifest.plm.d_tap]),
            "targets": ("I32", [n]),
            "example_offsets": ("I64", [e + 1]),
            "source_lengths": ("I32", [e]),
        }
        if manifest.dtype == "int8":
            self.layout |= {"scales": ("F32", [n]), "channel_scales": ("F32", [manifest.plm.d_tap])}
        if entry.sources:
            self.layout["sources"] = ("I64", [e])
        if entry.prompts is not None:
            p = [entry.prompts.tokens]
            self.layout |= {"prompt_tokens": ("I32", p), "prompt_spellings": ("I32", p), "prompt_spans": ("U8", p)}
            self.layout |= {"prompt_offsets": ("I64", [e + 1])}
            self.layout |= {"written": ("I32", [n])} if manifest.generated(entry) else {}

    def damaged(self, why: str) -> DamagedShardError:
        """Return the error for a damaged shard."""
        return DamagedShardError(self.path, why)

    @functools.cached_property
    def starts(self) -> dict[str, int]:
        """First byte of each tensor in the file.

        Raises:
            ExternalMemoryError: the header does not match the manifest.
        """
        try:
            places = read_header(self.path).places
        except DataError as error:
            raise self.damaged(str(error)) from None
        if {name: (place.dtype, list(place.shape)) for name, place in places.items()} != self.layout:
            raise self.damaged("its tensors do not match the manifest")
        return {name: place.start for name, place in places.items()}

    def require_whole(self) -> None:
        """Verify the SHA-256 of the file.

        Raises:
            ExternalMemoryError: the file has changed since it was written.
        """
        try:
            digest = sha256(self.path)
        except OSError as error:
            raise self.damaged(str(error.strerror)) from None
        if digest != self.entry.sha256:
            raise self.damaged("changed since it was written: its SHA-256 differs")

    def window(self, name: str, start: int, stop: int) -> npt.NDArray[np.uint8]:
        """Map rows [start, stop) of a tensor from the file as raw bytes (rows, bytes per row).

        The map is closed with the last array that refers to it.
        """
        code, shape = self.layout[name]
        width = BYTES[code] * int(np.prod(shape[1:]))
        if start == stop:
            return np.empty((0, width), np.uint8)
        first, last = self.starts[name] + start * width, self.starts[name] + stop * width
        aligned = first - first % mmap.ALLOCATIONGRANULARITY
        try:
            with open_regular(self.path) as file:
                mapped = mmap.mmap(file, last - aligned, access=mmap.ACCESS_READ, offset=aligned)
        except OSError as error:
            raise self.damaged(str(error.strerror)) from None
        except ValueError as error:
            raise self.damaged(str(error)) from None
        return np.frombuffer(mapped, np.uint8, last - first, first - aligned).reshape(stop - start, width)

    def read_ahead(self, start: int, stop: int) -> None:
        """Ask the kernel to prefetch representations [start, stop), so that reading overlaps with computation."""
        if not hasattr(os, "posix_fadvise"):
            return
        code, (_, d_tap) = self.layout["representations"]
        width = BYTES[code] * d_tap
        try:
            with open_regular(self.path) as file:
                first = self.starts["representations"] + start * width
                os.posix_fadvise(file, first, (stop - start) * width, os.POSIX_FADV_WILLNEED)
        except OSError as error:
            raise self.damaged(str(error.strerror)) from None

    def integers(self, name: str, start: int, stop: int) -> Integers:
        """Copy rows [start, stop) of an integer tensor as int64."""
        kind = np.dtype({"U8": "<u1", "I32": "<i4", "I64": "<i8"}[self.layout[name][0]])
        return self.window(name, start, stop).view(kind)[:, 0].astype(np.int64)

    @functools.cached_property
    def example_offsets(self) -> Integers:
        """(e + 1,): first row of each example, and the number of rows.

        Raises:
            ExternalMemoryError: they do not increase from 0 to the number of pairs.
        """
        offsets = self.integers("example_offsets", 0, self.entry.examples + 1)
        if offsets[0] != 0 or offsets[-1] != self.entry.pairs or (np.diff(offsets) < 1).any():
            raise self.damaged("its example offsets do not increase from 0 to the number of pairs")
        return offsets

    @functools.cached_property
    def source_lengths(self) -> Integers:
        """(e,): number of tokens of each example's source.

        Raises:
            ExternalMemoryError: one is less than 1 or exceeds the PLM's context window.
        """
        lengths = self.integers("source_lengths", 0, self.entry.examples)
        if not 1 <= lengths.min() <= lengths.max() <= self.max_length:
            raise self.damaged(f"a source length is outside 1 to {self.max_length:,}, the PLM's context window")
        return lengths

    @property
    def sources(self) -> Integers | None:
        """(e,): equal numbers for examples of one source; None if all sources differ."""
        return self.integers("sources", 0, self.entry.examples) if self.entry.sources else None

    @functools.cached_property
    def channel_scales(self) -> Tensor | None:
        """(d_tap,) float32 for int8, else None.

        Raises:
            ExternalMemoryError: one is not a positive finite number.
        """
        if "channel_scales" not in self.layout:
            return None
        raw = self.window("channel_scales", 0, self.layout["channel_scales"][1][0])
        scales = torch.from_numpy(raw.copy()).view(torch.float32)[:, 0]
        if not bool(((scales > 0) & torch.isfinite(scales)).all()):
            raise self.damaged("its channel scales are not positive numbers")
        return scales

    def targets(self, start: int, stop: int) -> Integers:
        """Return the targets of rows [start, stop); `NO_TARGET` for `matched` contexts without one.

        Raises:
            ExternalMemoryError: one is outside the vocabulary.
        """
        targets = self.integers("targets", start, stop)
        if len(targets) and not self._least_target <= targets.min() <= targets.max() < self.vocabulary_size:
            raise self.damaged(f"a target is outside the vocabulary of {self.vocabulary_size} tokens")
        return targets

    def prompts(self) -> StoredPrompts:
        """Read the tokens of the prompts.

        Raises:
            ExternalMemoryError: offsets do not increase from 0, or a token or span is impossible.
        """
        assert self.entry.prompts is not None
        p, n = self.entry.prompts.tokens, self.entry.pairs
        offsets = self.integers("prompt_offsets", 0, self.entry.examples + 1)
        if offsets[0] != 0 or offsets[-1] != p or (np.diff(offsets) < 1).any():
            raise self.damaged("its prompt offsets do not increase from 0 to the number of tokens")
        tokens, spellings, spans = (self.integers(f"prompt_{name}", 0, p) for name in ("tokens", "spellings", "spans"))
        written = self.integers("written", 0, n) if "written" in self.layout else None
        for values, least in ((tokens, 0), (spellings, -1), (np.zeros(1) if written is None else written, 0)):
            if not least <= values.min() <= values.max() < self.vocabulary_size:
                raise self.damaged(f"a token of a prompt is outside the vocabulary of {self.vocabulary_size} tokens")
        ends = np.repeat(offsets[1:], np.diff(offsets))
        if (np.arange(p) + spans > ends).any() or ((spans > 0) != (spellings >= 0)).any():
            raise self.damaged("a spelling ends outside its prompt")
        return StoredPrompts(
            tokens.astype(np.int32),
            spellings.astype(np.int32),
            spans.astype(np.uint8),
            offsets,
            None if written is None else written.astype(np.int32),
        )

    def contents(self) -> Contents:
        """Copy the whole shard into RAM."""
        n = self.entry.pairs
        dtype = next(kind for name, kind in DTYPES.items() if _STORED[name] == self.layout["representations"][0])
        scales = "scales" in self.layout
        return Contents(
            representations=torch.from_numpy(self.window("representations", 0, n).copy()).view(dtype),
            scales=torch.from_numpy(self.window("scales", 0, n).copy()).view(torch.float32)[:, 0] if scales else None,
            channel_scales=self.channel_scales,
            targets=torch.from_numpy(self.targets(0, n).astype(np.int32)),
            example_offsets=torch.from_numpy(self.example_offsets),
            source_lengths=torch.from_numpy(self.source_lengths.astype(np.int32)),
            sources=None if self.sources is None else torch.from_numpy(self.sources),
            prompts=None if self.entry.prompts is None else self.prompts(),
        )
