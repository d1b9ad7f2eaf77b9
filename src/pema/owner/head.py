"""The head bundle: everything that a representation passes through on its way to the PLM's logits."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from pema.errors import DataError, MismatchError, OwnerError
from pema.files import read_json, sha256, writing

if TYPE_CHECKING:
    from collections.abc import Mapping

FORMAT = 1
SETTINGS_FILE = "head.json"
TENSORS_FILE = "head.safetensors"


def digest_tensors(tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> str:
    """SHA-256 over settings and tensors, in the order of their names.

    Values are hashed as float32, so a checkpoint has one fingerprint whether it is held as it was stored or in a
    wider type that holds the same values.
    """
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(digest_tensor(tensors[name]))
    return digest.hexdigest()


def digest_tensor(tensor: Tensor) -> bytes:
    """SHA-256 over a tensor's shape and values, a piece at a time so that no second copy of it is ever alive."""
    digest = hashlib.sha256(str(tuple(tensor.shape)).encode())
    for piece in torch.split(tensor.detach().reshape(-1), 1 << 22):
        values = piece.to("cpu", torch.float32) if piece.is_floating_point() else piece.to("cpu")
        digest.update(values.contiguous().numpy().data)
    return digest.digest()


@dataclass(frozen=True)
class NormSettings:
    """What kind of norm stands in front of the head.

    Attributes:
        kind: "layer" subtracts the mean before it divides by the standard deviation, "rms" does not.
        eps: added to the mean square.
        offset: added to the weight (1 in the Gemma family).
    """

    kind: Literal["layer", "rms"]
    eps: float
    offset: float = 0.0


class Norm(nn.Module):
    """norm(x) = (x - m) / sqrt(mean((x - m)^2) + eps) * (offset + weight) + bias, with m = mean(x), or 0 for "rms".

    Computed in float32 whatever the input's type is, as the models do.
    """

    weight: Tensor | None
    bias: Tensor | None

    def __init__(self, settings: NormSettings, weight: Tensor | None, bias: Tensor | None) -> None:
        super().__init__()
        self.settings = settings
        self.register_buffer("weight", _frozen(weight))
        self.register_buffer("bias", _frozen(bias))

    def forward(self, x: Tensor) -> Tensor:
        """(..., d) -> (..., d), in the type of `x`."""
        y = x.float()
        if self.settings.kind == "layer":
            y = y - y.mean(-1, keepdim=True)
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + self.settings.eps)
        if self.weight is not None:
            y = y * (self.weight.float() + self.settings.offset)
        if self.bias is not None:
            y = y + self.bias.float()
        return y.to(x.dtype)


class Head(nn.Module):
    """logits(f) = soft_cap * tanh(scale * (W_hd normalise(f) + bias) / soft_cap); frozen.

    Without a soft cap, logits(f) = scale * (W_hd normalise(f) + bias). The tensors are buffers: they move with `.to()`
    and are never trained. A head that is derived from a model shares the model's memory.

    Attributes:
        weight: W_hd, (V, d).
        bias: (V,), or None.
        projection: (d, d_tap) between the final norm and W_hd, or None.
        norm: the final norm where the tap lies before it, or None.
        scale: factor on the raw logits.
        soft_cap: bound on the logits, or None.
    """

    weight: Tensor
    bias: Tensor | None
    projection: Tensor | None

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None = None,
        *,
        scale: float = 1.0,
        soft_cap: float | None = None,
        norm: Norm | None = None,
        projection: Tensor | None = None,
        fingerprint: str | None = None,
    ) -> None:
        super().__init__()
        self.register_buffer("weight", _frozen(weight))
        self.register_buffer("bias", _frozen(bias))
        self.register_buffer("projection", _frozen(projection))
        self.norm = norm
        self.scale = scale
        self.soft_cap = soft_cap
        self._fingerprint = fingerprint

    @property
    def d(self) -> int:
        """Width of what W_hd reads."""
        return self.weight.shape[1]

    @property
    def d_tap(self) -> int:
        """Width of a representation at the tap."""
        return self.weight.shape[1] if self.projection is None else self.projection.shape[1]

    @property
    def vocabulary_size(self) -> int:
        """Rows of W_hd."""
        return self.weight.shape[0]

    @property
    def settings(self) -> dict[str, Any]:
        """Everything but the tensors, JSON-ready."""
        return {
            "scale": self.scale,
            "soft_cap": self.soft_cap,
            "norm": None if self.norm is None else asdict(self.norm.settings),
        }

    @property
    def fingerprint(self) -> str:
        """What the head was made with, or SHA-256 over its settings and tensors as they were then; a cast keeps it."""
        if self._fingerprint is None:
            self._fingerprint = digest_tensors(self.state_dict(), self.settings)
        return self._fingerprint

    def normalise(self, f: Tensor) -> Tensor:
        """A representation at the tap as W_hd reads it; the identity where the tap is the head's input.

        Args:
            f: (n, d_tap).

        Returns:
            (n, d), in the type of `f`.
        """
        h = f if self.norm is None else self.norm(f)
        if self.projection is not None:
            h = (h.to(self.projection.dtype) @ self.projection.T).to(f.dtype)
        return h

    def logits(self, h: Tensor, tokens: Tensor | None = None) -> Tensor:
        """The PLM's logits for what W_hd reads.

        Args:
            h: (n, d), normalised.
            tokens: (k,) int64, the tokens whose logits are wanted; all of them where None.

        Returns:
            (n, V) or (n, k), float32; the product itself is computed in the head's type.
        """
        weight = self.weight if tokens is None else self.weight[tokens]
        return self.finish(h.to(weight.dtype) @ weight.T, tokens)

    def finish(self, raw: Tensor, tokens: Tensor | None = None) -> Tensor:
        """Raw products h W_hd^T to logits: bias, scale and soft cap.

        Args:
            raw: (..., V), or (..., k) for `tokens`.
            tokens: (k,) int64, the columns of `raw`; all of the vocabulary where None.

        Returns:
            The shape of `raw`, float32.
        """
        raw = raw.float()
        if self.bias is not None:
            raw = raw + (self.bias if tokens is None else self.bias[tokens]).float()
        return self.bound(raw)

    def bound(self, raw: Tensor) -> Tensor:
        """What follows the bias: scale and soft cap, (..., V) to (..., V) float32."""
        raw = raw.float()
        if self.scale != 1.0:
            raw = raw * self.scale
        if self.soft_cap is not None:
            raw = torch.tanh(raw / self.soft_cap) * self.soft_cap
        return raw

    def forward(self, f: Tensor) -> Tensor:
        """(n, d_tap) -> (n, V) float32."""
        return self.logits(self.normalise(f))

    def subset(self, tokens: Tensor) -> Head:
        """The head over some of the vocabulary: column j of its logits is the logit of tokens[j].

        Args:
            tokens: (k,) int64.
        """
        bias = None if self.bias is None else self.bias[tokens]
        return Head(
            self.weight[tokens],
            bias,
            scale=self.scale,
            soft_cap=self.soft_cap,
            norm=self.norm,
            projection=self.projection,
        )

    def save(self, folder: Path) -> None:
        """Write the bundle to `folder`, whole or not at all.

        Raises:
            StorageError: the disk refused; what stood there before is untouched.
        """
        with writing(folder) as temporary:
            temporary.mkdir(parents=True)
            save_file({k: v.cpu().contiguous() for k, v in self.state_dict().items()}, temporary / TENSORS_FILE)
            content = {
                "format": FORMAT,
                "fingerprint": self.fingerprint,
                "settings": self.settings,
                "tensors_sha256": sha256(temporary / TENSORS_FILE),
            }
            content["checksum"] = _checksum(content)
            (temporary / SETTINGS_FILE).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: Path, dtype: torch.dtype | None = None) -> Head:
        """Read a bundle that `save` wrote.

        Args:
            folder: the bundle.
            dtype: what W_hd is cast to while it is read, so that it is never whole in memory twice; as stored where
                None.

        Raises:
            OwnerError: the folder holds no bundle, or one of another format.
            MismatchError: the bundle was changed after it was written.
        """
        try:
            content = read_json(folder / SETTINGS_FILE)
        except DataError as error:
            raise OwnerError(f"{folder} holds no readable head bundle: {error}") from error
        if content.get("format") != FORMAT:
            raise OwnerError(
                f"the head bundle {folder} has format {content.get('format')!r}, this version reads {FORMAT}: "
                "write it again with `pema release`."
            )
        path = folder / TENSORS_FILE
        if not path.is_file():
            raise OwnerError(f"the head bundle {folder} lacks {TENSORS_FILE}: copy it again or run `pema release`.")
        claimed = content.pop("checksum", None)
        if claimed != _checksum(content) or content.get("tensors_sha256") != sha256(path):
            raise MismatchError(
                f"the head bundle {folder} was changed after it was written: its checksum does not match. "
                "Copy it again, or write it again with `pema release`."
            )
        try:
            tensors = _read(path, dtype)
        except (SafetensorError, OSError) as error:
            raise OwnerError(f"the head bundle {folder} cannot be read: {error}.") from error
        return cls.of(tensors, content["settings"], content["fingerprint"])

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], settings: Mapping[str, Any], fingerprint: str) -> Head:
        """The head of a state dict, its `settings` and its fingerprint."""
        norm = settings["norm"]
        return cls(
            tensors["weight"],
            tensors.get("bias"),
            scale=settings["scale"],
            soft_cap=settings["soft_cap"],
            norm=norm and Norm(NormSettings(**norm), tensors.get("norm.weight"), tensors.get("norm.bias")),
            projection=tensors.get("projection"),
            fingerprint=fingerprint,
        )

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Head:
        # The fingerprint says which head this is, so it is taken before a cast can round the values.
        if fn(torch.empty(0, dtype=self.weight.dtype)).dtype != self.weight.dtype:
            _ = self.fingerprint
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self


ROWS = 4096
"""Of W_hd that are read at a time where it is cast."""


def _read(path: Path, dtype: torch.dtype | None) -> dict[str, Tensor]:
    """The tensors of a bundle, mapped from the file; W_hd in `dtype`."""
    tensors: dict[str, Tensor] = load_file(path)
    stored = tensors["weight"]
    if dtype is None or stored.dtype == dtype:
        return tensors
    shape = stored.shape
    # Pages of a file stay resident while anything maps it, so each piece is read through a mapping of its own.
    tensors = {name: tensor.clone() for name, tensor in tensors.items() if name != "weight"}
    del stored
    weight = tensors["weight"] = torch.empty(shape, dtype=dtype)
    for start in range(0, len(weight), ROWS):
        with safe_open(path, framework="pt") as opened:
            weight[start : start + ROWS] = opened.get_slice("weight")[start : start + ROWS]
    return tensors


def _checksum(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _frozen(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach()
