"""Tiny real PLMs, built in the process: causal LMs of every family with random weights, and a byte-level tokenizer."""

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForCausalLM,
    BambaConfig,
    BloomConfig,
    CohereConfig,
    FalconConfig,
    FalconH1Config,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GPT2Config,
    GPTNeoXConfig,
    GptOssConfig,
    GraniteConfig,
    JambaConfig,
    Lfm2Config,
    Llama4TextConfig,
    LlamaConfig,
    Mamba2Config,
    MambaConfig,
    MiniMaxConfig,
    MistralConfig,
    MixtralConfig,
    MptConfig,
    Olmo2Config,
    OlmoConfig,
    OPTConfig,
    Phi3Config,
    PhiConfig,
    PhimoeConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
    Qwen3NextConfig,
    RecurrentGemmaConfig,
    RwkvConfig,
    SmolLM3Config,
)

VOCABULARY = 320
PAD, BOS, EOS = 0, 1, 2
_IDS = {"pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS}
_GPT = {"vocab_size": VOCABULARY, **_IDS}
_LLAMA = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    **_IDS,
}
_OPT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "word_embed_proj_dim": 32,
    "ffn_dim": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    **_IDS,
}

FAMILIES = {
    "opt": lambda: OPTConfig(**_OPT),
    "opt-projected": lambda: OPTConfig(**_OPT | {"word_embed_proj_dim": 16}),
    "opt-350m": lambda: OPTConfig(**_OPT | {"word_embed_proj_dim": 16, "do_layer_norm_before": False}),
    "gpt2": lambda: GPT2Config(n_positions=128, n_embd=32, n_layer=2, n_head=4, **_GPT),
    "gpt-neox": lambda: GPTNeoXConfig(**{k: v for k, v in _LLAMA.items() if k != "num_key_value_heads"}),
    "llama": lambda: LlamaConfig(**_LLAMA),
    "mistral": lambda: MistralConfig(**_LLAMA, sliding_window=8),
    "qwen2": lambda: Qwen2Config(**_LLAMA),
    "qwen3": lambda: Qwen3Config(**_LLAMA, head_dim=8),
    "gemma": lambda: GemmaConfig(**_LLAMA, head_dim=8),
    "gemma2": lambda: Gemma2Config(
        **_LLAMA, head_dim=8, sliding_window=8, final_logit_softcapping=3.0, query_pre_attn_scalar=8
    ),
    "gemma3": lambda: Gemma3TextConfig(**_LLAMA, head_dim=8, sliding_window=8, query_pre_attn_scalar=8),
    "phi": lambda: PhiConfig(**_LLAMA),
    "falcon": lambda: FalconConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, **_GPT),
    "falcon-alibi": lambda: FalconConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, alibi=True, **_GPT
    ),
    "bloom": lambda: BloomConfig(hidden_size=32, n_layer=2, n_head=4, **_GPT),
    "mpt": lambda: MptConfig(d_model=32, n_heads=4, n_layers=2, max_seq_len=128, **_GPT),
    "cohere": lambda: CohereConfig(**_LLAMA, logit_scale=0.0625),
    "granite": lambda: GraniteConfig(**_LLAMA, logits_scaling=8.0, embedding_multiplier=3.0, residual_multiplier=0.5),
    "olmo": lambda: OlmoConfig(**_LLAMA),
    "olmo2": lambda: Olmo2Config(**_LLAMA),
    "mamba": lambda: MambaConfig(hidden_size=32, num_hidden_layers=2, state_size=4, **_GPT),
}

# Contexts of more than 16 tokens are turned by other angles.
_LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0, 1.1, 1.3, 1.5],
    "long_factor": [2.0, 3.0, 5.0, 9.0],
    "original_max_position_embeddings": 16,
}
_MOE = {"num_experts_per_tok": 1, "num_local_experts": 2}

VARYING_FAMILIES = {
    "phi3-longrope": lambda: Phi3Config(
        **_LLAMA | {"num_key_value_heads": 4}, rope_parameters=dict(_LONGROPE), original_max_position_embeddings=16
    ),
    "llama-longrope": lambda: LlamaConfig(**_LLAMA, rope_parameters=dict(_LONGROPE)),
    "phimoe-longrope": lambda: PhimoeConfig(
        **_LLAMA, **_MOE, rope_parameters=_LONGROPE | {"short_mscale": 1.2, "long_mscale": 1.5}
    ),
    "llama-dynamic": lambda: LlamaConfig(
        **_LLAMA | {"max_position_embeddings": 16},
        rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0},
    ),
}
"""Families whose position encoding depends on a context's length."""

_SSM = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_chunk_size": 8}

HYBRID_FAMILIES = {
    "llama4": lambda: Llama4TextConfig(
        **_LLAMA,
        **_MOE,
        head_dim=8,
        intermediate_size_mlp=48,
        attention_chunk_size=8,
        no_rope_layers=[1, 0],
        attn_temperature_tuning=True,
        floor_scale=4,
    ),
    "smollm3": lambda: SmolLM3Config(**_LLAMA, no_rope_layers=[1, 0]),
    "gpt-oss": lambda: GptOssConfig(**_LLAMA, **_MOE, head_dim=8, sliding_window=8),
    "mixtral": lambda: MixtralConfig(**_LLAMA, **_MOE, sliding_window=8),
    "minimax": lambda: MiniMaxConfig(
        **_LLAMA, **_MOE, head_dim=8, layer_types=["linear_attention", "full_attention"], block_size=4
    ),
    "jamba": lambda: JambaConfig(
        **_LLAMA,
        attn_layer_period=2,
        attn_layer_offset=1,
        expert_layer_period=2,
        expert_layer_offset=1,
        num_experts=2,
        num_experts_per_tok=1,
        mamba_d_state=4,
    ),
    "bamba": lambda: BambaConfig(**_LLAMA, **_SSM, attn_layer_indices=[1], mamba_expand=2),
    "falcon-h1": lambda: FalconH1Config(**_LLAMA, **_SSM, mamba_d_ssm=64, mamba_n_groups=1),
    "qwen3-next": lambda: Qwen3NextConfig(
        **_LLAMA,
        head_dim=8,
        layer_types=["linear_attention", "full_attention"],
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        num_experts=2,
        num_experts_per_tok=1,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=16,
    ),
    "lfm2": lambda: Lfm2Config(**_LLAMA, layer_types=["conv", "full_attention"]),
    "mamba2": lambda: Mamba2Config(
        hidden_size=32, num_hidden_layers=2, state_size=8, num_heads=8, head_dim=8, chunk_size=8, n_groups=1, **_GPT
    ),
    "recurrent-gemma": lambda: RecurrentGemmaConfig(
        **{name: value for name, value in _LLAMA.items() if name != "max_position_embeddings"},
        attention_window_size=8,
        lru_width=32,
        block_types=["recurrent", "attention"],
    ),
}
"""Families with chunks of attention, layers without positions, experts, or another state than keys and values."""

SILENT_FAMILIES = {
    "minimax-linear": lambda: MiniMaxConfig(
        **_LLAMA, **_MOE, head_dim=8, layer_types=["linear_attention", "linear_attention"], block_size=4
    ),
    "rwkv": lambda: RwkvConfig(hidden_size=32, attention_hidden_size=32, num_hidden_layers=2, **_GPT),
}
"""Families whose state does not say its length."""


def build_model(family="llama", *, seed=0, dtype=torch.float32, vocab_size=VOCABULARY, layers=None):
    """A causal LM of `family` with random weights, norm weights and biases among them; of 2 layers if not told."""
    config = (FAMILIES | VARYING_FAMILIES | HYBRID_FAMILIES | SILENT_FAMILIES)[family]()
    if layers is not None:
        config.num_hidden_layers = layers
        # Where the kinds of the layers were listed for 2, the list for `layers` is made anew.
        config = type(config)(**{k: v for k, v in config.to_dict().items() if k != "layer_types"})
    config.vocab_size = vocab_size
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config)
        for parameter in model.parameters():
            noise = torch.randn_like(parameter)
            with torch.no_grad():
                # Matrices large enough that contexts differ; vectors far enough from 1 and 0 that a missing one shows.
                parameter.copy_(0.15 * noise if parameter.dim() > 1 else parameter + 0.3 * noise)
    return model.to(dtype).eval()


def build_tokenizer(*, bos=True, vocab_size=VOCABULARY):
    """A byte-level BPE tokenizer of `vocab_size` tokens; `bos` puts <s> in front of every text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    text = "Translate this from English to German: the house is small and the dog is here; das Haus ist klein."
    tokenizer.train_from_iterator([text] * 3, trainer)
    assert tokenizer.get_vocab_size() <= vocab_size
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        clean_up_tokenization_spaces=False,
    )
