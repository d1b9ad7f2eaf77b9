"""Tiny real PLMs, built in the process: causal LMs of every family with random weights, and a byte-level tokenizer."""

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    CohereConfig,
    FalconConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GPT2Config,
    GPTNeoXConfig,
    GraniteConfig,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    MptConfig,
    Olmo2Config,
    OlmoConfig,
    OPTConfig,
    PhiConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
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


def build_model(family="llama", *, seed=0, dtype=torch.float32, vocab_size=VOCABULARY, layers=None):
    """A causal LM of `family` with random weights, norm weights and biases among them; of 2 layers if not told."""
    config = FAMILIES[family]()
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
