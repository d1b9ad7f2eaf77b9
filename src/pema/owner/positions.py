"""Position encodings that depend on a context's length: LongRoPE (Phi-3.5, Phi-4-mini), dynamic NTK scaling.

Such a model rotates queries and keys by angles that depend on the largest position in the forward pass. Keys cached
from a shorter pass, or a batch with a longer row, then give different representations from those of the context alone.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

_FAR = 1 << 24
"""A length beyond every context window, to test whether the encoding changes at all."""


class PositionEncoding:
    """The position encoding of contexts by their length, computed by the model's own rotary modules.

    The modules compute the angles of position 1 in a pass of the given length, so thresholds, factors and scales come
    from the code of the forward pass. Absolute positions, ALiBi and plain rotary angles never vary.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._modules = list(rotary_modules(model))
        self._known: dict[int, bytes] = {}

    @cached_property
    def varies(self) -> bool:
        """Whether the encoding of a position depends on the length of its context."""
        # Without `_settle`, so that user-modified frequencies stay unchanged.
        return any(_angles(m, [1])[:, 0].ne(_angles(m, [1, _FAR - 1])[:, 0]).any() for m in self._modules)

    def of(self, length: int) -> bytes:
        """Return the encoding of contexts of `length` tokens; equal encodings may share keys and passes."""
        if not self.varies:
            return b""
        if length not in self._known:
            self._known[length] = self._asked(length)
        return self._known[length]

    def settle(self) -> None:
        """Reset the modules; otherwise dynamic scaling keeps the factors of the longest pass so far."""
        if self.varies:
            for module in self._modules:
                _settle(module)

    def stretches(self, first: int, last: int) -> Iterator[tuple[int, int]]:
        """Split the lengths from `first` to `last` into ranges (from, to) of one encoding each."""
        if not self.varies:
            yield first, last
            return
        while first <= last:
            low, high = first, last
            while low < high:  # binary search for the largest length with the encoding of `first`
                middle = (low + high + 1) // 2
                low, high = (middle, high) if self.of(middle) == self.of(first) else (low, middle - 1)
            yield first, low
            first = low + 1

    def _asked(self, length: int) -> bytes:
        asked = b""
        for module in self._modules:
            _settle(module)
            asked += _angles(module, [1, max(length, 2) - 1])[:, 0].cpu().numpy().tobytes()
            _settle(module)
        return asked


def rotary_modules(model: PreTrainedModel) -> Iterator[nn.Module]:
    """Yield the modules that compute rotary angles from positions."""
    for module in model.modules():
        derived = any(name.endswith("inv_freq") for name in module._non_persistent_buffers_set)
        if derived and "position_ids" in inspect.signature(module.forward).parameters:
            yield module


def altered_buffers(model: PreTrainedModel) -> Iterator[Tensor]:
    """Yield rotary frequencies that differ from the configuration, because a user has modified them."""
    positions = PositionEncoding(model)
    positions.settle()
    for module in rotary_modules(model):
        kind: Any = type(module)
        try:
            fresh = kind(module.config)
        except (AttributeError, TypeError, ValueError, KeyError):
            continue  # it cannot be constructed from its configuration
        for name in sorted(module._non_persistent_buffers_set):
            own, derived = getattr(module, name, None), getattr(fresh, name, None)
            if not isinstance(own, Tensor) or not isinstance(derived, Tensor) or own.device.type == "meta":
                continue
            own = own.detach().float().cpu()
            # A cast of the whole model rounds its frequencies; that is precision, not a modification.
            if own.shape != derived.shape or not torch.allclose(own, derived.float(), rtol=1e-2, atol=0):
                yield own


def _settle(module: nn.Module) -> None:
    """Reset the module to its state after a short pass; some versions of transformers do not reset it."""
    _angles(module, [0])
    for name in [*vars(module), *module._buffers]:
        original, current = getattr(module, name), name.replace("original_inv_freq", "inv_freq")
        if name.endswith("original_inv_freq") and not torch.equal(original, getattr(module, current).to(original)):
            with torch.inference_mode(False):  # the buffer outlives the pass in which it is created
                module.register_buffer(current, original.clone(), persistent=False)


def _angles(module: nn.Module, positions: list[int]) -> Tensor:
    """Return the module's output for `positions`: (values, len(positions), angles) float32."""
    device = next((b.device for b in module.buffers() if b.device.type != "meta"), torch.device("cpu"))
    x, ids = torch.zeros(1, 1, 1, device=device), torch.tensor([positions], device=device)
    layer_types: Any = getattr(module, "layer_types", None)
    by_layer = layer_types and "layer_type" in inspect.signature(module.forward).parameters
    kinds: Any = [(kind,) for kind in dict.fromkeys(layer_types)] if by_layer else [()]
    with torch.no_grad():
        outputs = [module(x, ids, *kind) for kind in kinds]
    parts = [part for given in outputs for part in (given if isinstance(given, tuple) else (given,))]
    parts = [torch.view_as_real(part).flatten(-2) if part.is_complex() else part for part in parts]
    return torch.cat([part.float().reshape(-1, len(positions), part.shape[-1])[:1] for part in parts], dim=-1)
