"""Position encodings that depend on a context's length: LongRoPE (Phi-3.5, Phi-4-mini), dynamic NTK scaling.

Such a model turns queries and keys by angles that follow from the longest position in the forward pass. Keys that were
kept from a shorter pass, or a batch with a longer row, then give other representations than the context alone.
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
"""A length beyond every context window, to see whether the encoding changes at all."""


class PositionEncoding:
    """Which encoding contexts of a length get, as the model's own rotary modules say it.

    They are asked for the angles of position 1 in a pass that reaches to the length, so thresholds, factors and scales
    come from the code that the forward pass runs. Absolute positions, ALiBi and plain rotary angles never vary.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._modules = list(rotary_modules(model))
        self._known: dict[int, bytes] = {}

    @cached_property
    def varies(self) -> bool:
        """Whether the encoding of a position depends on the length of the context that it is part of."""
        # Nothing is settled here: frequencies that somebody wrote into stay as they are.
        return any(_angles(m, [1])[:, 0].ne(_angles(m, [1, _FAR - 1])[:, 0]).any() for m in self._modules)

    def of(self, length: int) -> bytes:
        """The encoding of a context of that many tokens; two lengths with the same one may share keys and passes."""
        if not self.varies:
            return b""
        if length not in self._known:
            self._known[length] = self._asked(length)
        return self._known[length]

    def settle(self) -> None:
        """Forget the longest pass so far: dynamic scaling else keeps its factors for contexts that are shorter."""
        if self.varies:
            for module in self._modules:
                _settle(module)

    def stretches(self, first: int, last: int) -> Iterator[tuple[int, int]]:
        """The lengths from `first` to `last` in stretches (from, to) of one encoding each."""
        if not self.varies:
            yield first, last
            return
        while first <= last:
            low, high = first, last
            while low < high:  # the greatest length with the encoding of `first`; it changes in one direction only
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
    """The modules that compute rotary angles from positions."""
    for module in model.modules():
        derived = any(name.endswith("inv_freq") for name in module._non_persistent_buffers_set)
        if derived and "position_ids" in inspect.signature(module.forward).parameters:
            yield module


def altered_buffers(model: PreTrainedModel) -> Iterator[Tensor]:
    """Rotary frequencies that are not those of the configuration, because somebody wrote into them."""
    positions = PositionEncoding(model)
    positions.settle()
    for module in rotary_modules(model):
        kind: Any = type(module)
        try:
            fresh = kind(module.config)
        except (AttributeError, TypeError, ValueError, KeyError):
            continue  # it is made of something else than its configuration
        for name in sorted(module._non_persistent_buffers_set):
            own, derived = getattr(module, name, None), getattr(fresh, name, None)
            if not isinstance(own, Tensor) or not isinstance(derived, Tensor) or own.device.type == "meta":
                continue
            own = own.detach().float().cpu()
            # A model that was cast as a whole has rounded frequencies; that is how it runs, not what it is.
            if own.shape != derived.shape or not torch.allclose(own, derived.float(), rtol=1e-2, atol=0):
                yield own


def _settle(module: nn.Module) -> None:
    """Take the module to the state that a short pass leaves; some versions of transformers do not come back to it."""
    _angles(module, [0])
    for name in [*vars(module), *module._buffers]:
        original, current = getattr(module, name), name.replace("original_inv_freq", "inv_freq")
        if name.endswith("original_inv_freq") and not torch.equal(original, getattr(module, current).to(original)):
            with torch.inference_mode(False):  # the buffer outlives the pass that it is made in
                module.register_buffer(current, original.clone(), persistent=False)


def _angles(module: nn.Module, positions: list[int]) -> Tensor:
    """What the module makes of positions: (values, len(positions), angles) float32."""
    device = next((b.device for b in module.buffers() if b.device.type != "meta"), torch.device("cpu"))
    x, ids = torch.zeros(1, 1, 1, device=device), torch.tensor([positions], device=device)
    layer_types: Any = getattr(module, "layer_types", None)
    by_layer = layer_types and "layer_type" in inspect.signature(module.forward).parameters
    kinds: Any = [(kind,) for kind in dict.fromkeys(layer_types)] if by_layer else [()]
    with torch.no_grad():
        made = [module(x, ids, *kind) for kind in kinds]
    parts = [part for given in made for part in (given if isinstance(given, tuple) else (given,))]
    parts = [torch.view_as_real(part).flatten(-2) if part.is_complex() else part for part in parts]
    return torch.cat([part.float().reshape(-1, len(positions), part.shape[-1])[:1] for part in parts], dim=-1)
