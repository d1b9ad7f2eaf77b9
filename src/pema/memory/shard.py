"""A shard: the pairs of a run of whole examples in one safetensors file."""

from __future__ import annotations

import functools
import hashlib
import json
import mmap
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import safetensors.torch
import torch
from torch import Tensor

from pema.errors import ConfigError, DataError, ExternalMemoryError
from pema.files import writing
from pema.memory.manifest import RESTORE, Dtype, Manifest, ShardEntry

Integers = npt.NDArray[np.int64]

DTYPES: dict[Dtype, torch.dtype] = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "int8": torch.int8,
}
_CODES = {"F32": 4, "F16": 2, "BF16": 2, "I8": 1, "I32": 4, "I64": 8}
_STORED = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "int8": "I8"}


@dataclass(frozen=True)
class Contents:
    """What a shard holds: n pairs of e examples.

    Attributes:
        representations: (n, d_tap) in the memory's dtype.
        scales: (n,) float32, only with int8: row i stands for representations[i] * scales[i].
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

    def tensors(self) -> dict[str, Tensor]:
        """The tensors by their names in the file."""
        values = {
            "representations": self.representations,
            "targets": self.targets,
            "example_offsets": self.example_offsets,
            "source_lengths": self.source_lengths,
        }
        return values if self.scales is None else values | {"scales": self.scales}


class DamagedShardError(ExternalMemoryError):
    """A shard that does not hold what the manifest promises.

    Attributes:
        why: what is wrong with it.
    """

    def __init__(self, path: Path, why: str) -> None:
        super().__init__(f"{path} is damaged ({why}): {RESTORE}")
        self.why = why


def file_name(index: int) -> str:
    """Name of the shard that is `index`-th in its memory, counted from 0."""
    return f"shard-{index:05d}.safetensors"


def store(f: Tensor, dtype: Dtype, where: Callable[[int], str]) -> tuple[Tensor, Tensor | None]:
    """Bring representations into the dtype they are stored in.

    int8 is symmetric with one scale a row: scale = max|f| / 127, stored value = round(f / scale); so no component is
    further off than half a scale.

    Args:
        f: (n, d_tap), any floating dtype.
        dtype: the memory's dtype.
        where: names the example that a row belongs to, for the message.

    Returns:
        The stored rows (n, d_tap), and the scales (n,) float32 with int8.

    Raises:
        DataError: a representation holds NaN or infinity.
        ConfigError: a value is too large for `dtype`.
    """
    scales: Tensor | None = None
    if dtype == "int8":
        wide = f.float()
        scales = wide.abs().amax(1) / 127
        stored = (wide / scales.clamp_min(torch.finfo(torch.float32).tiny)[:, None]).round_().clamp_(-127, 127)
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
        row = int(finite.all(1).logical_not().nonzero()[0])
        raise ConfigError(
            f"{where(row)}: a representation reaches {float(f[row].abs().max()):.4g}, more than {dtype} holds "
            f"({torch.finfo(DTYPES[dtype]).max:.4g}): use dtype bfloat16, int8 or float32."
        )
    return stored, scales


def restore(stored: Tensor, scales: Tensor | None) -> Tensor:
    """The representations (n, d_tap) in float32 that stored rows stand for."""
    return stored.float() if scales is None else stored.float().mul_(scales[:, None])


def write_shard(folder: Path, index: int, contents: Contents) -> ShardEntry:
    """Write shard number `index` into `folder`, whole or not at all.

    Raises:
        StorageError: the disk refused it.
    """
    file = file_name(index)
    data = safetensors.torch.save(contents.tensors())
    with writing(folder / file) as temporary:
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
        self.vocabulary_size = manifest.plm.vocabulary_size
        n, e = entry.pairs, entry.examples
        self.layout: dict[str, tuple[str, list[int]]] = {
            "representations": (_STORED[manifest.dtype], [n, manifest.plm.d_tap]),
            "targets": ("I32", [n]),
            "example_offsets": ("I64", [e + 1]),
            "source_lengths": ("I32", [e]),
        }
        if manifest.dtype == "int8":
            self.layout["scales"] = ("F32", [n])

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
            with self.path.open("rb") as file:
                length = int.from_bytes(file.read(8), "little")
                if length > self.entry.bytes:
                    raise self.damaged("its header is longer than the file")
                header: dict[str, Any] = json.loads(file.read(length))
            found = {name: (value["dtype"], value["shape"]) for name, value in header.items()}
            spans = {name: value["data_offsets"] for name, value in header.items()}
        except OSError as error:
            raise self.damaged(str(error.strerror)) from None
        except (ValueError, KeyError, TypeError, AttributeError):
            raise self.damaged("its header cannot be read") from None
        if found != self.layout:
            raise self.damaged("its tensors are not those of the manifest")
        for name, (code, shape) in self.layout.items():
            first, last = spans[name]
            if last - first != _CODES[code] * int(np.prod(shape)) or not 0 <= first <= last <= self.entry.bytes:
                raise self.damaged(f"the place of {name} in it is wrong")
        return {name: 8 + length + span[0] for name, span in spans.items()}

    def window(self, name: str, start: int, stop: int) -> npt.NDArray[np.uint8]:
        """Rows start to stop of a tensor as raw bytes (rows, bytes per row), mapped from the file.

        The map goes with the last array that looks at it.
        """
        code, shape = self.layout[name]
        width = _CODES[code] * int(np.prod(shape[1:]))
        if start == stop:
            return np.empty((0, width), np.uint8)
        first, last = self.starts[name] + start * width, self.starts[name] + stop * width
        aligned = first - first % mmap.ALLOCATIONGRANULARITY
        try:
            with self.path.open("rb") as file:
                mapped = mmap.mmap(file.fileno(), last - aligned, access=mmap.ACCESS_READ, offset=aligned)
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
        width = _CODES[code] * d_tap
        try:
            with self.path.open("rb") as file:
                first = self.starts["representations"] + start * width
                os.posix_fadvise(file.fileno(), first, (stop - start) * width, os.POSIX_FADV_WILLNEED)
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
        """(e,): tokens of each example's source."""
        return self.integers("source_lengths", 0, self.entry.examples)

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
            targets=torch.from_numpy(self.targets(0, n).astype(np.int32)),
            example_offsets=torch.from_numpy(self.example_offsets),
            source_lengths=torch.from_numpy(self.source_lengths.astype(np.int32)),
        )
