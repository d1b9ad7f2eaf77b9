"""A shard: the pairs of a run of whole examples in one safetensors file."""

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
from pema.memory.manifest import RESTORE, Manifest, ShardEntry, file_name
from pema.tensors import BYTES, read_header

Integers = npt.NDArray[np.int64]

DTYPES: dict[Dtype, torch.dtype] = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "int8": torch.int8,
}
_STORED = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "int8": "I8"}


@dataclass(frozen=True)
class Contents:
    """What a shard holds: n pairs of e examples.

    Attributes:
        representations: (n, d_tap) in the memory's dtype.
        scales: (n,) float32, only with int8: row i stands for representations[i] * scales[i] * channel_scales.
        channel_scales: (d_tap,) float32, only with int8.
        targets: (n,) int32, the gold token of each pair.
        example_offsets: (e + 1,) int64; example j is rows example_offsets[j] to example_offsets[j + 1], in the order of
            its positions t = 0, 1, ...
        source_lengths: (e,) int32, tokens of each example's source text.
    """

    representations: Tensor
    scales: Tensor | None
    targets: Tensor
    example_offsets: Tensor
    source_lengths: Tensor
    channel_scales: Tensor | None = None

    def tensors(self) -> dict[str, Tensor]:
        """The tensors by their names in the file."""
        values = {
            "representations": self.representations,
            "targets": self.targets,
            "example_offsets": self.example_offsets,
            "source_lengths": self.source_lengths,
        }
        if self.scales is not None and self.channel_scales is not None:
            values |= {"scales": self.scales, "channel_scales": self.channel_scales}
        return values


class DamagedShardError(ExternalMemoryError):
    """A shard that does not hold what the manifest promises.

    Attributes:
        why: what is wrong with it.
    """

    def __init__(self, path: Path, why: str) -> None:
        super().__init__(f"{path} is damaged ({why}): {RESTORE}")
        self.why = why


def channel_scales_of(f: Tensor) -> Tensor:
    """The root of each component's mean square over some representations; 1 where all of it is 0.

    Representations have outliers, components that are a hundred times as large as the others in nearly every row
    (Dettmers et al. 2022, "LLM.int8()", section 3). Divided by these scales the components are of one size, so that
    one scale a row serves them all.

    Args:
        f: (n, d_tap).

    Returns:
        (d_tap,) float32.
    """
    scales = f.double().square().mean(0).sqrt().float()
    return torch.where(scales > 0, scales, 1.0).clamp(torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max)


def store(
    f: Tensor, dtype: Dtype, where: Callable[[int], str], channel_scales: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Bring representations into the dtype they are stored in.

    int8 is symmetric with one scale a row and one a component: with u = f / channel_scales, scale = max|u| / 127 and
    stored value = round(u / scale); so component j is no further off than scale * channel_scales[j] / 2.

    Args:
        f: (n, d_tap), any floating dtype.
        dtype: the memory's dtype.
        where: names the example that a row belongs to, for the message.
        channel_scales: (d_tap,), with int8.

    Returns:
        The stored rows (n, d_tap), and the scales (n,) float32 with int8.

    Raises:
        DataError: a representation holds NaN or infinity.
        ConfigError: a value is too large for `dtype`.
    """
    scales: Tensor | None = None
    if channel_scales is not None:
        u = f.float() / channel_scales
        scales = u.abs().amax(1) / 127
        stored = (u / scales.clamp_min(torch.finfo(torch.float32).tiny)[:, None]).round_().clamp_(-127, 127)
        stored, finite = stored.to(torch.int8), torch.isfinite(scales)
    else:
        stored = f.to(DTYPES[dtype])
        finite = torch.isfinite(stored)
    if not bool(finite.all()):
        broken = torch.isfinite(f).all(1).logical_not().nonzero()
        if len(broken):
            raise DataError(
                f"{where(int(broken[0]))}: the PLM's representation holds NaN or infinity. "
                f"Leave this example out, or load the PLM in float32."
            )
        row = int(finite.reshape(len(finite), -1).all(1).logical_not().nonzero()[0])
        most = torch.finfo(torch.float32 if dtype == "int8" else DTYPES[dtype]).max
        raise ConfigError(
            f"{where(row)}: a representation reaches {float(f[row].abs().max()):.4g}, more than {dtype} holds "
            f"({most:.4g}): use dtype bfloat16, int8 or float32."
        )
    return stored, scales


def restore(stored: Tensor, scales: Tensor | None, channel_scales: Tensor | None = None) -> Tensor:
    """The representations (n, d_tap) in float32 that stored rows stand for.

    Args:
        stored: (n, d_tap).
        scales: (n,), with int8.
        channel_scales: (d_tap,), or (n, d_tap) where the rows are of several shards, with int8.
    """
    f = stored.float()
    return f if scales is None or channel_scales is None else f.mul_(scales[:, None]).mul_(channel_scales)


def write_shard(folder: Path, index: int, contents: Contents) -> ShardEntry:
    """Write shard number `index` into `folder`, whole or not at all.

    Raises:
        StorageError: the disk refused it.
    """
    file = file_name(index)
    data = safetensors.torch.save(contents.tensors())
    with writing(folder / file, private=True) as temporary:
        temporary.write_bytes(data)
    return ShardEntry(
        file=file,
        bytes=len(data),
        sha256=hashlib.sha256(data).hexdigest(),
        pairs=len(contents.targets),
        examples=len(contents.source_lengths),
    )


class ShardFile:
    """Reads rows of one shard through memory maps that live no longer than the call.

    No window is kept, so neither the resident size nor the address space grows with the memory.
    """

    def __init__(self, folder: Path, entry: ShardEntry, manifest: Manifest) -> None:
        self.path = folder / entry.file
        self.entry = entry
        self.vocabulary_size, self.max_length = manifest.plm.vocabulary_size, manifest.plm.max_length
        n, e = entry.pairs, entry.examples
        self.layout: dict[str, tuple[str, list[int]]] = {
            "representations": (_STORED[manifest.dtype], [n, manifest.plm.d_tap]),
            "targets": ("I32", [n]),
            "example_offsets": ("I64", [e + 1]),
            "source_lengths": ("I32", [e]),
        }
        if manifest.dtype == "int8":
            self.layout |= {"scales": ("F32", [n]), "channel_scales": ("F32", [manifest.plm.d_tap])}

    def damaged(self, why: str) -> DamagedShardError:
        """The error that says that this shard cannot be read."""
        return DamagedShardError(self.path, why)

    @functools.cached_property
    def starts(self) -> dict[str, int]:
        """Where each tensor's bytes begin in the file.

        Raises:
            ExternalMemoryError: the header is not the one that the manifest promises.
        """
        try:
            places = read_header(self.path).places
        except DataError as error:
            raise self.damaged(str(error)) from None
        if {name: (place.dtype, list(place.shape)) for name, place in places.items()} != self.layout:
            raise self.damaged("its tensors are not those of the manifest")
        return {name: place.start for name, place in places.items()}

    def require_whole(self) -> None:
        """Read every byte.

        Raises:
            ExternalMemoryError: they are not those that were written.
        """
        try:
            found = sha256(self.path)
        except OSError as error:
            raise self.damaged(str(error.strerror)) from None
        if found != self.entry.sha256:
            raise self.damaged("changed since it was written: its SHA-256 differs")

    def window(self, name: str, start: int, stop: int) -> npt.NDArray[np.uint8]:
        """Rows start to stop of a tensor as raw bytes (rows, bytes per row), mapped from the file.

        The map goes with the last array that looks at it.
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
        """Tell the kernel that representations start to stop come next: the disk works while the processor does."""
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
        """Rows start to stop of an integer tensor, copied as int64."""
        kind = np.dtype("<i4") if self.layout[name][0] == "I32" else np.dtype("<i8")
        return self.window(name, start, stop).view(kind)[:, 0].astype(np.int64)

    @functools.cached_property
    def example_offsets(self) -> Integers:
        """(e + 1,): first row of each example, and the number of rows.

        Raises:
            ExternalMemoryError: they do not rise from 0 to the number of pairs.
        """
        offsets = self.integers("example_offsets", 0, self.entry.examples + 1)
        if offsets[0] != 0 or offsets[-1] != self.entry.pairs or (np.diff(offsets) < 1).any():
            raise self.damaged("its example offsets do not rise from 0 to the number of pairs")
        return offsets

    @functools.cached_property
    def source_lengths(self) -> Integers:
        """(e,): tokens of each example's source.

        Raises:
            ExternalMemoryError: one is less than 1 or more than a context of the PLM holds.
        """
        lengths = self.integers("source_lengths", 0, self.entry.examples)
        if not 1 <= lengths.min() <= lengths.max() <= self.max_length:
            raise self.damaged(f"a source length lies outside 1 to {self.max_length:,}, the PLM's context window")
        return lengths

    @functools.cached_property
    def channel_scales(self) -> Tensor | None:
        """(d_tap,) float32 with int8.

        Raises:
            ExternalMemoryError: one is not a positive number.
        """
        if "channel_scales" not in self.layout:
            return None
        raw = self.window("channel_scales", 0, self.layout["channel_scales"][1][0])
        scales = torch.from_numpy(raw.copy()).view(torch.float32)[:, 0]
        if not bool(((scales > 0) & torch.isfinite(scales)).all()):
            raise self.damaged("its channel scales are not positive numbers")
        return scales

    def targets(self, start: int, stop: int) -> Integers:
        """Targets of rows start to stop.

        Raises:
            ExternalMemoryError: one lies outside the vocabulary.
        """
        targets = self.integers("targets", start, stop)
        if len(targets) and not 0 <= targets.min() <= targets.max() < self.vocabulary_size:
            raise self.damaged(f"a target lies outside the vocabulary of {self.vocabulary_size} tokens")
        return targets

    def contents(self) -> Contents:
        """The whole shard, copied into memory."""
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
        )
