"""The model that vLLM and SGLang serve in the tests: a Llama and a tokenizer that are the same on every machine."""

import random

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from pema.owner.local import LocalPLM

SPECIAL = ("<pad>", "<s>", "</s>")
VOCABULARY = 264
D = 16


def build_llama(seed=0):
    """A Llama whose numbers are multiples of 1/1024, drawn by Python's generator; its heads are of a size of vLLM's."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=D,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=128,
        tie_word_embeddings=False,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    drawn = random.Random(seed)
    model = LlamaForCausalLM(config).eval()
    for parameter in model.parameters():
        values = [round(512 * (drawn.random() - 0.5)) / 1024 for _ in range(parameter.numel())]
        with torch.no_grad():
            parameter.copy_(torch.tensor(values).reshape(parameter.shape) + (parameter.dim() == 1))
    return model


def build_tokenizer():
    """A tokenizer of bytes, with <s> in front of every text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate((*SPECIAL, *alphabet))}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", model_max_length=128
    )


def build_plm(seed=0):
    """The model as transformers runs it."""
    return LocalPLM(build_llama(seed), build_tokenizer())


def write_model(folder):
    """Write the model and its tokenizer as a folder of transformers."""
    build_llama().save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    return folder
