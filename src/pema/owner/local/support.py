"""Which models can be a PLM: refused by name, with what to do, before anything is run."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pema.errors import OwnerError
from pema.owner.weights import tensor_of


def require_supported(model: object, tokenizer: object) -> None:
    """Refuse what is no causal language model of transformers with its weights at hand, or no tokenizer.

    Raises:
        OwnerError: names what it is, and the remedy.
    """
    name = type(model).__name__
    if not isinstance(model, nn.Module):
        raise OwnerError(f"{name} is no model: give one that is loaded, or use LocalPLM.load with a name or a folder.")
    # peft is not always installed, and wraps in place as well as from outside.
    if any(type(module).__module__.partition(".")[0] == "peft" for module in model.modules()):
        raise OwnerError(
            f"{name} holds a PEFT adapter, which can be switched and whose settings no fingerprint sees: merge it into "
            "the weights (model = model.merge_and_unload()), or take it off where it cannot be merged (prefix, prompt)."
        )
    if not isinstance(model, PreTrainedModel):
        raise OwnerError(
            f"{name} is no model of transformers: give the PreTrainedModel itself, without what is wrapped around it "
            "(of a compiled model, model._orig_mod)."
        )
    if getattr(model.config, "is_encoder_decoder", False):
        raise OwnerError(
            f"{name} is an encoder-decoder, and a PLM is a causal language model: give one that AutoModelForCausalLM "
            "loads."
        )
    for prefix, module in model.named_modules():
        for own, _ in module.named_parameters(recurse=False):
            tensor = tensor_of(module, own)
            if tensor is not None and tensor.device.type == "meta":
                raise OwnerError(
                    f"{name} has no weights: {prefix}.{own} is on the meta device. Load it with from_pretrained."
                )
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise OwnerError(f"{type(tokenizer).__name__} is no tokenizer: give the one that AutoTokenizer loads.")
