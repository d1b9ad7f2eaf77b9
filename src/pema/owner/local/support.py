"""Check of models and tokenizers: unsupported ones are refused before anything is run."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pema.errors import OwnerError
from pema.owner.weights import tensor_of


def require_supported(model: object, tokenizer: object) -> None:
    """Refuse anything but a causal language model of transformers with its weights, and a tokenizer.

    Raises:
        OwnerError: one of them is not supported; the message says what it is, and what to do.
    """
    name = type(model).__name__
    if not isinstance(model, nn.Module):
        raise OwnerError(f"{name} is not a model: give a loaded model, or use LocalPLM.load with a name or a folder.")
    # peft may not be installed; it wraps models in place or from outside.
    if any(type(module).__module__.partition(".")[0] == "peft" for module in model.modules()):
        raise OwnerError(
            f"{name} contains a PEFT adapter, which can be switched and is not part of the fingerprint: merge it into "
            "the weights (model = model.merge_and_unload()), or remove it if it cannot be merged (prefix, prompt)."
        )
    if not isinstance(model, PreTrainedModel):
        raise OwnerError(
            f"{name} is not a model of transformers: give the PreTrainedModel itself, without a wrapper "
            "(for a compiled model: model._orig_mod)."
        )
    if getattr(model.config, "is_encoder_decoder", False):
        raise OwnerError(
            f"{name} is an encoder-decoder, but a PLM must be a causal language model: give one that "
            "AutoModelForCausalLM loads."
        )
    for prefix, module in model.named_modules():
        for own, _ in module.named_parameters(recurse=False):
            tensor = tensor_of(module, own)
            if tensor is not None and tensor.device.type == "meta":
                raise OwnerError(
                    f"{name} has no weights: {prefix}.{own} is on the meta device. Load it with from_pretrained."
                )
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise OwnerError(f"{type(tokenizer).__name__} is not a tokenizer: give the one that AutoTokenizer loads.")
