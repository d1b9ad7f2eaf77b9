"""Tensors in safetensors files: written with the umask's mode, validated by their header before they are read."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pema.errors import DataError
from pema.files import open_regular, parse_json

if TYPE_CHECKING:
    from torch import Tensor

# torch is imported where it is used: headers are read by commands that answer before it is loaded.

HEADER_BYTES = 1 << 24
"""Maximum size of a header that is read, in bytes."""

BYTES = {
    "F64": 8,
    "F32": 4,
    "F16": 2,
    "BF16": 2,
    "I64": 8,
    "I32": 4,
    "I16": 2,
    "I8": 1,
    "U8": 1,
    "BOOL": 1,
}
"""Bytes per entry, by the name of the type in a header."""

FLOATS = ("F64", "F32", "F16", "BF16")

ENTRIES_AT_ONCE = 1 << 18
"""Number of tensor entries processed at a time: few enough for a processor's cache."""


@dataclass(frozen=True)
class Place:
    """The location of a tensor in its file.

    Attributes:
        dtype: name of its type, a key of `BYTES`.
        shape: its shape.
        start: offset of its first byte in the file.
        stop: offset after its last byte.
    """

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


@dataclass(frozen=True)
class Header:
    """The header of a safetensors file.

    Attributes:
        places: the tensors, by name.
        texts: the file's metadata.
    """

    places: Mapping[str, Place]
    texts: Mapping[str, str]


def read_header(path: Path) -> Header:
    """Read the header of a safetensors file, without its tensors.

    The tensors must fill the file without gaps or overlaps.

    Raises:
        DataError: the file is invalid; the message says why, without the path.
    """
    try:
        with open_regular(path) as descriptor:
            size = os.fstat(descriptor).st_size
            length = int.from_bytes(os.pread(descriptor, 8, 0), "little")
            if size < 8 or length > size - 8:
                raise DataError("its header is longer than the file")
            if length > HEADER_BYTES:
                raise DataError(f"its header has {length:,} bytes, more than {HEADER_BYTES:,}")
            data = os.pread(descriptor, length, 8)
    except OSError as error:
        raise DataError(str(error.strerror or error)) from None
    try:
        values = parse_json(data, "its header")
    except DataError as error:
        raise DataError(str(error).rstrip(".")) from None
    texts = values.pop("__metadata__", {})
    if not isinstance(texts, dict) or not all(isinstance(text, str) for text in texts.values()):
        raise DataError("the metadata in its header is not text")
    places = {name: _place(name, value, 8 + length) for name, value in values.items()}
    end = 8 + length
    for name, place in sorted(places.items(), key=lambda item: (item[1].start, item[1].stop)):
        if place.start != end:
            raise DataError(f"the offsets of {name!r} in it are wrong")
        end = place.stop
    if end != size:
        raise DataError(f"its tensors end at byte {end:,} of {size:,}")
    return Header(places, texts)


def _place(name: str, value: object, base: int) -> Place:
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise DataError(f"its header does not describe {name[:40]!r}")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in BYTES:
        raise DataError(f"{name[:40]!r} in it has an unknown type")
    for numbers in (shape, offsets):
        if not isinstance(numbers, list) or not all(type(n) is int and 0 <= n < 1 << 62 for n in numbers):
            raise DataError(f"the shape or the offsets of {name[:40]!r} in it are not a list of integers")
    if len(offsets) != 2 or len(shape) > 8 or offsets[1] - offsets[0] != BYTES[dtype] * math.prod(shape):
        raise DataError(f"the offsets of {name[:40]!r} in it are wrong")
    return Place(dtype, tuple(shape), base + offsets[0], base + offsets[1])


def save_tensors(tensors: Mapping[str, Tensor], path: Path, texts: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file; call it inside `pema.files.writing`, which reports failed writes."""
    from safetensors.torch import save_file

    path.touch()
    mode = path.stat().st_mode & 0o777  # follows the umask; the library would set 0600
    save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, path, dict(texts or {}) or None)
    path.chmod(mode)


def is_finite(tensor: Tensor) -> bool:
    """Return whether every entry is finite, without copying the tensor."""
    import torch

    if not tensor.is_floating_point() or not tensor.numel():
        return True
    # If any entry is NaN, aminmax returns NaN for both minimum and maximum.
    extremes = (torch.aminmax(piece.float()) for piece in torch.split(tensor.reshape(-1), ENTRIES_AT_ONCE))
    return all(math.isfinite(low) and math.isfinite(high) for low, high in extremes)
