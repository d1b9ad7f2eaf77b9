"""Tiny GGUF files, made in the process: a Llama with random weights in any type, and the tokenizer of tests/tiny.py."""

import json

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tiny import BOS, EOS, PAD, VOCABULARY, build_tokenizer

TEMPLATE = "{% for m in messages %}<s>{{ m['role'] }}: {{ m['content'] }}</s>{% endfor %}"
NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def build_llama(seed=0, tied=False):
    """A Llama whose rows are multiples of 32, the size of a block, and whose numbers float32 holds exactly."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=128,
        rms_norm_eps=2.0**-20,
        tie_word_embeddings=tied,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config).eval()
        for parameter in model.parameters():
            with torch.no_grad():
                parameter.copy_(0.15 * torch.randn_like(parameter) + (parameter.dim() == 1))
    return model


def name_in_file(name):
    """The name of a weight in a GGUF file."""
    fixed = {"model.embed_tokens.weight": "token_embd", "model.norm.weight": "output_norm", "lm_head.weight": "output"}
    if name in fixed:
        return f"{fixed[name]}.weight"
    _, _, layer, rest = name.split(".", 3)
    return f"blk.{layer}.{NAMES[rest.removesuffix('.weight')]}.weight"


def rounded(values, kind):
    """A matrix as it is read back from a file that stores it in blocks of `kind`."""
    from gguf import GGMLQuantizationType, dequantize, quantize

    kind = GGMLQuantizationType[kind]
    return dequantize(quantize(values, kind), kind)


def turned(values, heads):
    """The rows of a query or key projection in the order of llama.cpp."""
    rows, d = values.shape
    return values.reshape(heads, 2, rows // heads // 2, d).swapaxes(1, 2).reshape(rows, d)


def write_gguf(path, kind="Q8_0", *, model=None, tokenizer=None, without=(), architecture="llama", **metadata):
    """Write a GGUF file with the matrices of `model` in `kind` and its vectors in float32.

    `metadata` replaces entries, by their names with "_" for "."; None leaves one out. `without` names tensors.
    """
    from gguf import GGMLQuantizationType, GGUFWriter, TokenType, quantize

    model, tokenizer = model or build_llama(), tokenizer or build_tokenizer()
    config, content = model.config, json.loads(tokenizer.backend_tokenizer.to_str())
    vocabulary = sorted(content["model"]["vocab"].items(), key=lambda entry: entry[1])
    tokens = [token for token, _ in vocabulary] + [f"<unused{n}>" for n in range(config.vocab_size - len(vocabulary))]
    writer = GGUFWriter(path, architecture)
    writer.add_name("Tiny")
    entries = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "head_count": config.num_attention_heads,
        "head_count_kv": config.num_key_value_heads,
        "layer_norm_rms_eps": config.rms_norm_eps,
        "rope_dimension_count": config.head_dim,
        "rope_freq_base": 10000.0,
        "vocab_size": config.vocab_size,
        "tokenizer_model": "gpt2",
        "tokenizer_pre": "default",
        "token_list": tokens,
        "token_types": [
            TokenType.CONTROL if token in ("<pad>", "<s>", "</s>") else TokenType.NORMAL for token in tokens
        ],
        "token_merges": [" ".join(merge) for merge in content["model"]["merges"]],
        "bos_token_id": BOS,
        "eos_token_id": EOS,
        "pad_token_id": PAD,
        "add_bos_token": True,
        "chat_template": TEMPLATE,
    }
    for name, value in (entries | metadata).items():
        if value is not None:
            getattr(writer, f"add_{name}")(value)
    for name, parameter in model.state_dict().items():
        if name in without or (name == "lm_head.weight" and config.tie_word_embeddings):
            continue
        values = parameter.numpy()
        for projection, heads in (("q_proj", config.num_attention_heads), ("k_proj", config.num_key_value_heads)):
            if projection in name:
                values = turned(values, heads)
        values = np.ascontiguousarray(values, dtype=np.float32)
        if values.ndim == 1 or kind == "F32":
            writer.add_tensor(name_in_file(name), values)
        else:
            stored = GGMLQuantizationType[kind]
            writer.add_tensor(name_in_file(name), quantize(values, stored), raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
