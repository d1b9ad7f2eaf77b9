"""The head bundle: all layers between a representation and the PLM's logits."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from pema.errors import ConfigError, MismatchError, OwnerError
from pema.files import sha256, writing
from pema.owner.bundle import (
    AGAIN,
    MASKED,
    NormSettings,
    Settings,
    changed,
    digest_finite,
    digest_tensors,
    open_bundle,
    read_tensors,
    require_fingerprint,
    require_fit,
    write_bundle,
)
from pema.owner.places import HEAD_BUNDLE
from pema.schema import from_json
from pema.storage.fetching import local
from pema.storage.publishing import destination
from pema.tensors import read_header

_CODES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


class Norm(nn.Module):
    """norm(x) = (x - m) / sqrt(mean((x - m)^2) + eps) * (offset + weight) + bias, with m = mean(x), or 0 for "rms".

    It is computed in float32 for every input type, as the models do.
    """

    weight: Tensor | None
    bias: Tensor | None

    def __init__(self, settings: NormSettings, weight: Tensor | None, bias: Tensor | None) -> None:
        super().__init__()
        self.settings = settings
        self.register_buffer("weight", _frozen(weight))
        self.register_buffer("bias", _frozen(bias))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise (..., d) -> (..., d), in the type of `x`."""
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
    and are never trained. A head derived from a model shares the model's memory.

    Attributes:
        weight: W_hd, (V, d).
        bias: (V,), or None.
        projection: (d, d_tap) between the final norm and W_hd, or None.
        norm: the final norm if the tap is in front of it, or None.
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
        self.scale = float(scale)
        self.soft_cap = None if soft_cap is None else float(soft_cap)
        self._fingerprint = fingerprint
        self._cast = False

    @property
    def d(self) -> int:
        """Width of the input of W_hd."""
        return self.weight.shape[1]

    @property
    def d_tap(self) -> int:
        """Width of a representation at the tap."""
        return self.weight.shape[1] if self.projection is None else self.projection.shape[1]

    @property
    def vocabulary_size(self) -> int:
        """Number of rows of W_hd."""
        return self.weight.shape[0]

    @property
    def settings(self) -> dict[str, Any]:
        """Settings (everything except the tensors), JSON-ready."""
        return {
            "scale": self.scale,
            "soft_cap": self.soft_cap,
            "norm": None if self.norm is None else asdict(self.norm.settings),
        }

    @property
    def fingerprint(self) -> str:
        """Fingerprint given at construction, or SHA-256 of the original settings and tensors; a cast keeps it."""
        if self._fingerprint is None:
            self._fingerprint = digest_tensors(self.state_dict(), self.settings)
        return self._fingerprint

    def normalise(self, f: Tensor) -> Tensor:
        """Map a representation at the tap to the input of W_hd; the identity if the tap is the head's input.

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
        """Compute the PLM's logits from the input of W_hd.

        Args:
            h: (n, d), normalised.
            tokens: (k,) int64, the tokens whose logits are computed; None means all.

        Returns:
            (n, V) or (n, k), float32; the product itself is computed in the head's type.
        """
        weight = self.weight if tokens is None else self.weight[tokens]
        return self.finish(h.to(weight.dtype) @ weight.T, tokens)

    def finish(self, raw: Tensor, tokens: Tensor | None = None) -> Tensor:
        """Apply bias, scale and soft cap to the raw products h W_hd^T.

        Args:
            raw: (..., V), or (..., k) for `tokens`.
            tokens: (k,) int64, the columns of `raw`; None means the whole vocabulary.

        Returns:
            Logits in the shape of `raw`, float32.
        """
        raw = raw.float()
        if self.bias is not None:
            raw = raw + (self.bias if tokens is None else self.bias[tokens]).float()
        return self.bound(raw)

    def bound(self, raw: Tensor) -> Tensor:
        """Apply scale and soft cap, (..., V) -> (..., V) float32."""
        raw = raw.float()
        if self.scale != 1.0:
            raw = raw * self.scale
        if self.soft_cap is not None:
            raw = torch.tanh(raw / self.soft_cap) * self.soft_cap
        return raw

    def forward(self, f: Tensor) -> Tensor:
        """Compute logits: (n, d_tap) -> (n, V) float32."""
        return self.logits(self.normalise(f))

    def subset(self, tokens: Tensor) -> Head:
        """Return the head over a part of the vocabulary: column j of its logits is the logit of tokens[j].

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

    def save(self, folder: Path | str) -> None:
        """Write the bundle to `folder`, atomically, or to an address in object storage.

        Raises:
            OwnerError: it was cast after its fingerprint was computed, so its tensors do not match the fingerprint.
            StorageError: the write failed; the previous content is unchanged. Or the address has another bundle.
        """
        if self._cast:
            raise OwnerError(
                f"this head was cast to {self.weight.dtype} after it was created: save it before the cast."
            )
        with destination(folder, HEAD_BUNDLE, anew=True) as new, writing(new) as temporary:
            write_bundle(self.state_dict(), self.settings, self.fingerprint, temporary)

    @classmethod
    def load(cls, folder: Path | str, dtype: torch.dtype | None = None) -> Head:
        """Read a bundle that `save` wrote.

        Args:
            folder: the bundle, or its address.
            dtype: type that W_hd is cast to while it is read, so that it is never in memory twice; None keeps the
                stored type.

        Raises:
            OwnerError: the folder contains no bundle, one in another format, or an invalid one.
            MismatchError: the bundle has changed since it was written, or does not match its fingerprint.
        """
        folder = local(folder, HEAD_BUNDLE)
        bundle, path = open_bundle(folder)
        masked = bundle.fingerprint.startswith(MASKED)
        try:
            tensors, digests = read_tensors(path, dtype)
            require_fingerprint(bundle.fingerprint, digests, bundle.settings, f"the head bundle {folder}")
            # For a plain head the fingerprint has already verified every tensor.
            if masked and sha256(path) != bundle.tensors_sha256:
                raise changed(folder)
        except (SafetensorError, OSError) as error:
            raise OwnerError(f"the head bundle {folder} cannot be read: {error}.") from error
        except (OwnerError, MismatchError) as error:
            if sha256(path) != bundle.tensors_sha256:
                raise changed(folder) from None
            if isinstance(error, MismatchError):
                raise
            raise OwnerError(f"the head bundle {folder} cannot be used: {error}; {AGAIN}") from error
        head = cls._made(tensors, bundle.settings, bundle.fingerprint)
        head._cast = dtype is not None and read_header(path).places["weight"].dtype != _CODES.get(dtype)
        return head

    @staticmethod
    def stored_shape(folder: Path) -> tuple[int, int, int]:
        """Return (V, d, d_tap) of the head in a bundle, from its settings and the header of its tensors only.

        Raises:
            OwnerError, MismatchError: see `load`.
        """
        _, path = open_bundle(folder)
        places = read_header(path).places
        V, d = places["weight"].shape
        return V, d, places["projection"].shape[1] if "projection" in places else d

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], settings: object, fingerprint: str) -> Head:
        """Build a head from a state dict, its `settings` and its fingerprint, all untrusted input.

        Raises:
            OwnerError: they do not form a head; the message says why.
            MismatchError: they do not match the fingerprint.
        """
        try:
            parsed = from_json(Settings, settings, "settings")
            require_fit({name: (tuple(t.shape), t.is_floating_point()) for name, t in tensors.items()}, parsed)
            digests = {name: digest_finite(name, tensor) for name, tensor in tensors.items()}
        except (ConfigError, OwnerError) as error:
            raise OwnerError(f"an LM head cannot be used: {error}.") from error
        require_fingerprint(fingerprint, digests, parsed, "an LM head")
        return cls._made(tensors, parsed, fingerprint)

    @classmethod
    def _made(cls, tensors: Mapping[str, Tensor], settings: Settings, fingerprint: str) -> Head:
        norm = settings.norm
        return cls(
            tensors["weight"],
            tensors.get("bias"),
            scale=settings.scale,
            soft_cap=settings.soft_cap,
            norm=None if norm is None else Norm(norm, tensors.get("norm.weight"), tensors.get("norm.bias")),
            projection=tensors.get("projection"),
            fingerprint=fingerprint,
        )

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Head:
        # The fingerprint identifies the original head, so it is computed before a cast can round the values.
        if fn(torch.empty(0, dtype=self.weight.dtype)).dtype != self.weight.dtype:
            _ = self.fingerprint
            self._cast = True
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self


def _frozen(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach()
