"""What crosses the network: tensors as safetensors with text beside them, never anything that is executed."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from typing import Literal, get_args

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from pema.errors import ConfigError, DataError

VERSION = 1
"""Of the protocol; a client and a server of different versions refuse each other by name."""

TENSORS = "application/vnd.safetensors"
"""Content type of a body that carries tensors."""

WireDtype = Literal["float32", "float16", "bfloat16"]
"""Precision of the representations that cross."""


def pack(tensors: Mapping[str, Tensor], texts: Mapping[str, str] | None = None) -> bytes:
    """Tensors, and texts in the header, as the bytes of one safetensors file."""
    body: bytes = save({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, dict(texts or {}))
    return body


def unpack(body: bytes) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The inverse of `pack`.

    Raises:
        DataError: the body is not a safetensors file.
    """
    try:
        tensors = load(body)
        (size,) = struct.unpack_from("<Q", body)
        texts = json.loads(body[8 : 8 + size]).get("__metadata__", {})
    except (
        # What a library says of bytes that somebody made up differs with the byte.
        SafetensorError,
        struct.error,
        ValueError,
        AttributeError,
        TypeError,
        KeyError,
        RuntimeError,
        OverflowError,
    ) as error:
        raise DataError(f"{len(body):,} bytes that should carry tensors are no safetensors file: {error}.") from error
    return tensors, texts


def narrow(f: Tensor, dtype: WireDtype) -> Tensor:
    """Representations in the precision that crosses.

    Raises:
        ConfigError: the precision is not known.
        DataError: a finite value does not fit into it.
    """
    if dtype not in get_args(WireDtype):
        raise ConfigError(f"precision {dtype!r} is not known: use {', '.join(get_args(WireDtype))}.")
    narrowed = f.to(getattr(torch, dtype))
    if dtype == "float16" and bool((narrowed.isinf() & f.isfinite()).any()):
        raise DataError(
            f"a representation holds {f.abs().max().item():.4g}, float16 ends at 65,504: ask for bfloat16 or float32."
        )
    return narrowed
