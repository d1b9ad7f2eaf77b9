# ruff: noqa: RUF009  (`option` is `dataclasses.field` with the limits beside the field)
"""Head bundles on the disk: settings and tensors are validated before any of them is used."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from safetensors import safe_open

from pema.errors import ConfigError, DataError, MismatchError, OwnerError
from pema.files import read_json, recover, sha256
from pema.schema import from_json, option, short
from pema.tensors import ENTRIES_AT_ONCE, FLOATS, is_finite, read_header, save_tensors

if TYPE_CHECKING:
    import torch
    from torch import Tensor

# torch is not imported here: manifests, which are read by commands that answer at once, name the files of a bundle.

FORMAT = 1
SETTINGS_FILE = "head.json"
TENSORS_FILE = "head.safetensors"
SETTINGS_BYTES = 1 << 16
AGAIN = "copy it again, or write it again with `pema release`."

MASKED = "masked-"
"""Prefix of a masked head's fingerprint, which is asserted by its owner; others are computed from the head itself."""


def digest_tensors(tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> str:
    """Return the SHA-256 of settings and tensors, in the order of their names.

    Values are hashed as float32, so a checkpoint has the same fingerprint in its stored type and in any wider type.
    """
    return _digest_of({name: digest_tensor(tensor) for name, tensor in tensors.items()}, settings)


def _digest_of(digests: Mapping[str, bytes], settings: Mapping[str, Any]) -> str:
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
    for name in sorted(digests):
        digest.update(name.encode())
        digest.update(digests[name])
    return digest.hexdigest()


def digest_tensor(tensor: Tensor) -> bytes:
    """Return the SHA-256 of a tensor's shape and values, computed piecewise without a full copy."""
    digest = hashlib.sha256(str(tuple(tensor.shape)).encode())
    _update(digest, tensor)
    return digest.digest()


def _update(digest: hashlib._Hash, tensor: Tensor, finite: str | None = None) -> None:
    """Hash a tensor's values; refuse NaN and infinity if `finite` (the name of the tensor) is given."""
    import torch

    for piece in torch.split(tensor.detach().reshape(-1), ENTRIES_AT_ONCE):
        values = piece.cpu().float() if piece.is_floating_point() else piece.cpu()
        if finite is not None and not is_finite(values):
            raise OwnerError(f"its {finite} contains NaN or infinity")
        digest.update(values.contiguous().numpy().data)


@dataclass(frozen=True)
class NormSettings:
    """Settings of the norm in front of the head.

    Attributes:
        kind: "layer" subtracts the mean before it divides by the standard deviation, "rms" does not.
        eps: added to the mean square.
        offset: added to the weight (1 in the Gemma family).
    """

    kind: Literal["layer", "rms"] = option()
    eps: float = option(least=0.0, most=1.0)
    offset: float = option(0.0, least=-64.0, most=64.0)


@dataclass(frozen=True)
class Settings:
    """Settings of a head: everything except its tensors; see `Head`."""

    scale: float = option(above=0.0, most=1e9)
    soft_cap: float | None = option(above=0.0, most=1e9)
    norm: NormSettings | None = option()


@dataclass(frozen=True)
class Bundle:
    """The content of `head.json`, without format and checksum."""

    fingerprint: str = option(line=True, longest=512)
    settings: Settings = option()
    tensors_sha256: str = option(pattern="[0-9a-f]{64}")


ROWS = 4096
"""Number of rows of W_hd read at a time if it is cast."""


def open_bundle(folder: Path) -> tuple[Bundle, Path]:
    """Read a bundle's settings and the path of its tensors, after validating their header."""
    recover(folder)
    try:
        content = read_json(folder / SETTINGS_FILE, SETTINGS_BYTES)
    except DataError as error:
        raise OwnerError(f"{folder} contains no readable head bundle: {error}") from error
    bundle, path = parse_bundle(content, folder), folder / TENSORS_FILE
    if not path.is_file():
        raise OwnerError(f"the head bundle {folder} lacks {TENSORS_FILE}: {AGAIN}")
    try:
        places = read_header(path).places
        require_fit({name: (place.shape, place.dtype in FLOATS) for name, place in places.items()}, bundle.settings)
    except (DataError, OwnerError) as error:
        raise OwnerError(f"the head bundle {folder} cannot be used: {error}; {AGAIN}") from error
    return bundle, path


def parse_bundle(content: Mapping[str, Any], folder: Path | str) -> Bundle:
    """Parse the content of `head.json`, which is untrusted input; `folder` is for messages.

    Raises:
        OwnerError: it has another format, or is damaged.
        MismatchError: it has changed since it was written.
    """
    version = content.get("format")
    if version != FORMAT:
        raise OwnerError(
            f"the head bundle {folder} has format {short(version)}, this version reads {FORMAT}: write it again with "
            "`pema release`."
        )
    values = {name: value for name, value in content.items() if name not in ("format", "checksum")}
    try:
        bundle = from_json(Bundle, values)
    except ConfigError as error:
        raise OwnerError(f"the head bundle {folder} cannot be used: {error}; {AGAIN}") from error
    if content.get("checksum") != _checksum({"format": FORMAT} | values):
        raise changed(folder)
    return bundle


def changed(folder: Path | str) -> MismatchError:
    """Return the error for a bundle that has changed since it was written."""
    return MismatchError(
        f"the head bundle {folder} was changed after it was written: its checksum does not match. {AGAIN.capitalize()}"
    )


def require_fit(tensors: Mapping[str, tuple[tuple[int, ...], bool]], settings: Settings) -> None:
    """Refuse tensors that do not form a head, given each one's shape and whether it is floating-point."""
    if "weight" not in tensors:
        raise OwnerError("it has no tensor weight (W_hd)")
    if len(tensors["weight"][0]) != 2 or 0 in tensors["weight"][0]:
        raise OwnerError(f"its weight has shape {tensors['weight'][0]}, expected (V, d) for W_hd")
    V, d = tensors["weight"][0]
    projection = tensors.get("projection", ((d, d), True))[0]
    d_tap = projection[-1] if projection else 0
    wanted = {"weight": (V, d), "bias": (V,), "projection": (d, d_tap)}
    if settings.norm is not None:
        wanted |= {"norm.weight": (d_tap,), "norm.bias": (d_tap,)}
    for name, (shape, floating) in tensors.items():
        if name not in wanted:
            raise OwnerError(f"it has an unknown tensor {short(name)} for these settings")
        if shape != wanted[name] or 0 in shape:
            raise OwnerError(f"its {name} has shape {shape}, expected {wanted[name]} for a W_hd of {(V, d)}")
        if not floating:
            raise OwnerError(f"its {name} is not floating-point")


def require_fingerprint(fingerprint: str, digests: Mapping[str, bytes], settings: Settings, what: str) -> None:
    """Refuse tensors and settings that do not match a fingerprint; that of a masked head cannot be checked."""
    if not fingerprint.startswith(MASKED) and fingerprint != _digest_of(digests, asdict(settings)):
        raise MismatchError(
            f"{what} does not match its fingerprint {short(fingerprint)}: its weights or settings differ. "
            "Ask its owner for the right one."
        )


def digest_finite(name: str, tensor: Tensor) -> bytes:
    """Return `digest_tensor`; refuse NaN and infinity."""
    digest = hashlib.sha256(str(tuple(tensor.shape)).encode())
    _update(digest, tensor, name)
    return digest.digest()


def read_tensors(path: Path, dtype: torch.dtype | None) -> tuple[dict[str, Tensor], dict[str, bytes]]:
    """Read the tensors of a bundle, with W_hd in `dtype`, and the digests of the stored values."""
    from safetensors.torch import load_file

    tensors: dict[str, Tensor] = load_file(path)
    digests = {name: digest_finite(name, tensor) for name, tensor in tensors.items() if name != "weight"}
    stored = tensors["weight"]
    if dtype is None or stored.dtype == dtype:
        return tensors, digests | {"weight": digest_finite("weight", stored)}
    shape = stored.shape
    weight = stored.new_empty(shape, dtype=dtype)
    # Pages of a file stay resident while it is mapped, so each piece is read through a separate mapping.
    tensors = {name: tensor.clone() for name, tensor in tensors.items() if name != "weight"}
    del stored
    tensors["weight"] = weight
    digest = hashlib.sha256(str(tuple(shape)).encode())
    for start in range(0, len(weight), ROWS):
        with safe_open(path, framework="pt") as opened:
            piece = opened.get_slice("weight")[start : start + ROWS]
            _update(digest, piece, "weight")
            weight[start : start + ROWS] = piece
    return tensors, digests | {"weight": digest.digest()}


def write_bundle(tensors: Mapping[str, Tensor], settings: Mapping[str, Any], fingerprint: str, folder: Path) -> None:
    """Write a bundle into the new folder `folder`; call it inside `pema.files.writing`."""
    folder.mkdir(parents=True)
    save_tensors(tensors, folder / TENSORS_FILE)
    content = {
        "format": FORMAT,
        "fingerprint": fingerprint,
        "settings": dict(settings),
        "tensors_sha256": sha256(folder / TENSORS_FILE),
    }
    content["checksum"] = _checksum(content)
    (folder / SETTINGS_FILE).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _checksum(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
