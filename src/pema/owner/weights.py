"""The weights of a model wherever they lie: on devices, or offloaded by accelerate to the CPU or the disk."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel


def tensor_of(module: nn.Module, name: str) -> Tensor | None:
    """A parameter or buffer of `module` with its values, also where accelerate keeps them elsewhere; None if absent."""
    tensor = getattr(module, name, None)
    if not isinstance(tensor, Tensor):
        return None
    if tensor.device.type == "meta":
        weights_map = getattr(getattr(module, "_hf_hook", None), "weights_map", None)
        if weights_map is not None:
            value = weights_map[name]
            return value if isinstance(value, Tensor) else torch.as_tensor(value)
    return tensor


def device_of(model: PreTrainedModel) -> torch.device:
    """Where the model's inputs go; accelerate moves them on where the weights themselves are offloaded."""
    return torch.device("cpu") if model.device.type == "meta" else model.device
