"""The weights of a model wherever they lie: on devices, or offloaded by accelerate to the CPU or the disk."""

from __future__ import annotations

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from pema.owner.head import digest_tensor

# What a configuration says of where a model comes from and how it is run or trained, but not of what it computes.
_NOT_ESSENTIAL = frozenset(
    {
        "_name_or_path",
        "architectures",
        "auto_map",
        "transformers_version",
        "dtype",
        "torch_dtype",
        "use_cache",
        "attn_implementation",
        "output_attentions",
        "output_hidden_states",
        "return_dict",
        "pad_token_id",
        "bos_token_id",
        "eos_token_id",
        "initializer_range",
        "init_std",
        "id2label",
        "label2id",
        "pretraining_tp",
        "tie_word_embeddings",
    }
)


def essentials(config: PreTrainedConfig) -> dict[str, Any]:
    """What a transformers configuration says of the function that the model computes.

    Only what differs from the class's defaults, so that a setting which a later version of transformers adds does not
    change it.
    """

    def keep(values: dict[str, Any]) -> dict[str, Any]:
        return {
            key: keep(value) if isinstance(value, dict) else value
            for key, value in values.items()
            if key not in _NOT_ESSENTIAL and not key.endswith(("dropout", "_pdrop", "layerdrop"))
        }

    return keep(config.to_diff_dict())


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


def fingerprint(model: PreTrainedModel) -> str:
    """SHA-256 over what the model computes: its architecture, configuration and weights.

    Tied weights count once, under the name that comes first. Values are hashed as float32 (see `digest_tensors`), so
    neither the device nor a wider type changes the result.
    """
    tensors: dict[str, Tensor] = {}
    seen: set[tuple[Any, ...]] = set()
    for prefix, module in model.named_modules():
        own = [n for n, _ in module.named_parameters(recurse=False)]
        own += [n for n, _ in module.named_buffers(recurse=False) if n not in module._non_persistent_buffers_set]
        for name in own:
            tensor = tensor_of(module, name)
            if tensor is None:
                continue
            place = (tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride())
            if tensor.numel() and place not in seen:
                seen.add(place)
                tensors[f"{prefix}.{name}"] = tensor
    names = sorted(tensors)
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        digests = list(pool.map(lambda name: digest_tensor(tensors[name]), names))
    settings = {"architecture": type(model).__name__, "config": essentials(model.config)}
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
    for name, value in zip(names, digests, strict=True):
        digest.update(name.encode() + value)
    return digest.hexdigest()
