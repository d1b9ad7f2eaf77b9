"""Access to a model's weights on any device or offloaded by accelerate, and fingerprints of the model."""

from __future__ import annotations

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from pema.owner.bundle import digest_tensor
from pema.owner.positions import altered_buffers

# Fields of a configuration about a model's origin, execution or training, which do not affect its output.
_FIRST_NOT_ESSENTIAL = frozenset(
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
_NOT_ESSENTIAL = _FIRST_NOT_ESSENTIAL | {
    "chunk_size_feed_forward",
    "cls_token_id",
    "decoder_start_token_id",
    "experts_implementation",
    "finetuning_task",
    "gradient_checkpointing",
    "initializer_cutoff_factor",
    "initializer_factor",
    "is_encoder_decoder",
    "label_smoothing",
    "num_labels",
    "output_router_logits",
    "prefix",
    "problem_type",
    "router_aux_loss_coef",
    "router_jitter_noise",
    "router_z_loss_coef",
    "sep_token_id",
    "task_specific_params",
    "tokenizer_class",
    "use_associative_scan",
    "use_mamba_kernels",
    "use_mambapy",
}
_DROPOUT = ("dropout", "_pdrop", "layerdrop")


@dataclass(frozen=True)
class Fingerprints:
    """A fingerprint, and the fingerprints of the same object in earlier versions of pema.

    Attributes:
        current: the fingerprint that is written now.
        earlier: fingerprints that older memories and adapters may contain; without `current`.
    """

    current: str
    earlier: tuple[str, ...]


def fingerprint(model: PreTrainedModel) -> str:
    """Return the SHA-256 of the model; see `model_fingerprints`."""
    return model_fingerprints(model).current


def model_fingerprints(model: PreTrainedModel) -> Fingerprints:
    """Return the SHA-256 of everything that determines the model's output: architecture, configuration, weights.

    Tied weights count once, under the first name, however they are stored: one matrix shared by two modules, a copy
    per module read from the disk, or both in the checkpoint. Values are hashed as float32 (see `digest_tensor`), so
    neither the device nor a wider type changes the result; a checkpoint rounded to a narrower type is another PLM.
    Rotary frequencies count only if they differ from the configuration.
    """
    tensors: dict[str, Tensor] = {}
    names_of: dict[int, str] = {}
    seen: set[tuple[Any, ...]] = set()
    for prefix, module in model.named_modules():
        own = [n for n, _ in module.named_parameters(recurse=False)]
        own += [n for n, _ in module.named_buffers(recurse=False) if n not in module._non_persistent_buffers_set]
        names_of[id(module)] = prefix
        for name in own:
            tensor = tensor_of(module, name)
            if tensor is None:
                continue
            place = (tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride())
            if tensor.numel() and place not in seen:
                seen.add(place)
                tensors[f"{prefix}.{name}"] = tensor
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        digests = dict(zip(tensors, pool.map(digest_tensor, tensors.values()), strict=True))
    once = dict(digests)
    for a, b in _tied(model, names_of):
        if a != b and a in once and b in once and once[a] == once[b]:
            del once[max(a, b, key=list(digests).index)]
    altered = [digest_tensor(buffer) for buffer in altered_buffers(model)]
    architecture = type(model).__name__
    current = _sha256(architecture, essentials(model.config), once, altered)
    earlier = {_sha256(architecture, _first_essentials(model.config), tensors, []) for tensors in (digests, once)}
    return Fingerprints(current, () if altered else tuple(sorted(earlier - {current})))


def _sha256(architecture: str, config: dict[str, Any], digests: dict[str, bytes], altered: list[bytes]) -> str:
    settings = {"architecture": architecture, "config": config}
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
    for name in sorted(digests):
        digest.update(name.encode() + digests[name])
    for value in altered:
        digest.update(b"altered frequencies" + value)
    return digest.hexdigest()


def _tied(model: PreTrainedModel, names_of: dict[int, str]) -> list[tuple[str, str]]:
    """Return pairs of names of weights that may be tied: those that the model declares, and its two embeddings."""
    declared = getattr(model, "all_tied_weights_keys", None) or {}
    pairs = [(name if "." in name else f".{name}", of if "." in of else f".{of}") for name, of in declared.items()]
    ends = [names_of.get(id(m)) for m in (model.get_input_embeddings(), model.get_output_embeddings())]
    if None not in ends:
        pairs.append((f"{ends[0]}.weight", f"{ends[1]}.weight"))
    return list(dict.fromkeys(pairs))


def essentials(config: PreTrainedConfig) -> dict[str, Any]:
    """Return the fields of a transformers configuration that determine the model's output."""

    def keep(values: dict[str, Any]) -> dict[str, Any]:
        kept = {
            key: _rotary(value) if key == "rope_parameters" else keep(value) if isinstance(value, dict) else value
            for key, value in values.items()
            if key not in _NOT_ESSENTIAL and not key.endswith((*_DROPOUT, "dropout_prob"))
        }
        if "partial_rotary_factor" in str(kept.get("rope_parameters")):
            kept.pop("partial_rotary_factor", None)  # only some versions of transformers repeat it
        return kept

    return keep(config.to_diff_dict())


def _rotary(parameters: object) -> object:
    """Convert rotary parameters to the form of the newest transformers, without older names and empty fields."""
    if not isinstance(parameters, dict):
        return parameters
    nested = any(isinstance(value, dict) for value in parameters.values())
    if nested:  # one set per kind of layer
        return {key: _rotary(value) for key, value in parameters.items() if isinstance(value, dict)}
    return {key: value for key, value in parameters.items() if key != "type" or "rope_type" not in parameters}


def _first_essentials(config: PreTrainedConfig) -> dict[str, Any]:
    """Return `essentials` in the form of the first version of pema, for older memories and adapters."""

    def keep(values: dict[str, Any]) -> dict[str, Any]:
        return {
            key: keep(value) if isinstance(value, dict) else value
            for key, value in values.items()
            if key not in _FIRST_NOT_ESSENTIAL and not key.endswith(_DROPOUT)
        }

    return keep(config.to_diff_dict())


def tensor_of(module: nn.Module, name: str) -> Tensor | None:
    """Return a parameter or buffer of `module`, with its values also if accelerate offloads them; None if absent."""
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
    """Return the device of the model's inputs; for offloaded weights, accelerate moves them on."""
    return torch.device("cpu") if model.device.type == "meta" else model.device
