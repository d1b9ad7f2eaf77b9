"""Models that are not supported as PLM are refused by the constructor, by name and with the remedy."""

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    LlamaConfig,
    LlamaModel,
    T5Config,
    T5ForConditionalGeneration,
)

from pema.errors import OwnerError
from pema.owner.local import LocalPLM
from tiny import _LLAMA, build_model, build_tokenizer


def t5():
    return T5ForConditionalGeneration(T5Config(vocab_size=320, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4))


def without_weights():
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(LlamaConfig(**_LLAMA))


def with_head(dtype):
    model = build_model()
    model.lm_head.weight.data = model.lm_head.weight.data.to(dtype)
    return model


class Packed(torch.nn.Parameter):
    """A weight of a class of its own, as quantisation libraries make them."""


def with_packed_head():
    model = build_model()
    model.lm_head.weight = Packed(model.lm_head.weight.detach())
    return model


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")
@pytest.mark.parametrize(
    ("make", "match"),
    [
        (t5, "T5ForConditionalGeneration is an encoder-decoder, .* AutoModelForCausalLM loads"),
        (
            lambda: AutoModelForSequenceClassification.from_config(LlamaConfig(**_LLAMA)),
            "LlamaForSequenceClassification is not supported: it has no output embedding",
        ),
        (lambda: LlamaModel(LlamaConfig(**_LLAMA)), "LlamaModel is not supported: it has no output embedding"),
        (without_weights, "LlamaForCausalLM has no weights: model.embed_tokens.weight is on the meta device"),
        (lambda: torch.nn.Linear(2, 2), "Linear is not a model of transformers: give the PreTrainedModel itself"),
        (lambda: torch.compile(build_model()), r"OptimizedModule is not a model of transformers: .* model\._orig_mod"),
        (lambda: "embedded", "str is not a model: .* use LocalPLM.load"),
        (lambda: with_head(torch.float8_e4m3fn), "its weight a Parameter of float8_e4m3fn, .* LM head unquantised"),
        (with_packed_head, "its weight a Packed of float32, .* LM head unquantised"),
    ],
    ids=["T5", "classifier", "base", "meta", "layer", "compiled", "name", "float8", "packed"],
)
def test_what_is_no_plm(make, match):
    with pytest.raises(OwnerError, match=match):
        LocalPLM(make(), build_tokenizer())


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # from peft's own call
@pytest.mark.parametrize("kind", ["LoRA", "prefix"])
def test_a_model_with_a_peft_adapter(kind):
    peft = pytest.importorskip("peft")
    config = (
        peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")
        if kind == "LoRA"
        else peft.PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")
    )
    wrapped = peft.get_peft_model(build_model(), config)
    with pytest.raises(OwnerError, match=r"PeftModelForCausalLM contains a PEFT adapter, .*merge_and_unload\(\)"):
        LocalPLM(wrapped, build_tokenizer())
    if kind == "LoRA":
        with pytest.raises(OwnerError, match="LlamaForCausalLM contains a PEFT adapter"):
            LocalPLM(wrapped.base_model.model, build_tokenizer())
        assert LocalPLM(wrapped.merge_and_unload(), build_tokenizer()).description.architecture == "LlamaForCausalLM"


def test_what_is_no_tokenizer():
    with pytest.raises(OwnerError, match="NoneType is not a tokenizer: give the one that AutoTokenizer loads"):
        LocalPLM(build_model(), None)
