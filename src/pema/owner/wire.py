"""The wire format: tensors as safetensors with text metadata, never anything executable."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Mapping
from typing import Literal, get_args

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from pema.errors import DataError
from pema.owner.contract import PLMDescription
from pema.schema import among

VERSION = 1
"""Version of the protocol; a client and a server of different versions refuse each other."""

TENSORS = "application/vnd.safetensors"
"""Content type of a body with tensors."""

WireDtype = Literal["float32", "float16", "bfloat16"]
"""Precision of representations on the network."""


ROUTE = "Pema-Route"
"""Header of a request by whose hash a proxy may choose the replica: constant for a session, random for all others."""

IDENTITY = "Pema-PLM"
"""Header of a request that must not be answered by another PLM than the one with this identity."""


def identity(description: PLMDescription) -> str:
    """Return the identity of a PLM on the network: equal for two with the same outputs, tokenizer, head and tap."""
    parts = description.fingerprint, description.tokenizer_fingerprint, description.head_fingerprint, description.tap
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def pack(tensors: Mapping[str, Tensor], texts: Mapping[str, str] | None = None) -> bytes:
    """Pack tensors, and texts in the header, into the bytes of a safetensors file."""
    body: bytes = save({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, dict(texts or {}))
    return body


def unpack(body: bytes) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Unpack the result of `pack`.

    Raises:
        DataError: the body is not a safetensors file.
    """
    try:
        tensors = load(body)
        (size,) = struct.unpack_from("<Q", body)
        texts = json.loads(body[8 : 8 + size]).get("__metadata__", {})
    except (
        # For malformed bytes the library raises different exceptions, depending on the byte.
        SafetensorError,
        struct.error,
        ValueError,
        AttributeError,
        TypeError,
        KeyError,
        RuntimeError,
        OverflowError,
    ) as error:
        raise DataError(
            f"a body of {len(body):,} bytes that should contain tensors is not a safetensors file: {error}."
        ) from error
    return tensors, texts


def narrow(f: Tensor, dtype: WireDtype) -> Tensor:
    """Convert representations to the precision of the network.

    Raises:
        ConfigError: the precision is unknown.
        DataError: a finite value is too large for it.
    """
    among("precision", [dtype], get_args(WireDtype))
    narrowed = f.to(getattr(torch, dtype))
    if dtype == "float16" and bool((narrowed.isinf() & f.isfinite()).any()):
        raise DataError(
            f"a representation contains {f.abs().max().item():.4g}, more than the maximum of float16 (65,504): "
            "request bfloat16 or float32."
        )
    return narrowed
