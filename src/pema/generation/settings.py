"""Decoding settings: the user's and the package's, never those stored in a PLM's folder."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from typing import Any

from transformers import GenerationConfig, PreTrainedModel

from pema.errors import ConfigError
from pema.generation.config import LARGEST, GenerateConfig
from pema.schema import among, require

SAMPLING = ("temperature", "top_k", "top_p", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff")
BEAMS = ("early_stopping", "length_penalty")
HONOURED = frozenset(
    (
        *("num_beams", "do_sample", *SAMPLING, *BEAMS),
        *("eos_token_id", "min_new_tokens", "max_time", "exponential_decay_length_penalty"),
        *("repetition_penalty", "no_repeat_ngram_size", "bad_words_ids", "sequence_bias", "watermarking_config"),
        *("suppress_tokens", "begin_suppress_tokens", "remove_invalid_values", "renormalize_logits"),
        *("use_cache", "cache_implementation", "cache_config", "compile_config", "disable_compile"),
    )
)
"""Supported fields of transformers' GenerationConfig: each text is decoded as if it were alone in its batch."""

ARGUMENTS = ("logits_processor", "stopping_criteria")
"""Arguments of the model's `generate` that are passed on, together with the package's own."""

KNOWN = sorted({*HONOURED, *ARGUMENTS, "max_length", *(field.name for field in fields(GenerateConfig))})
"""All settings that `generate` accepts."""

OF_THE_HISTORY = ("logits_processor", "no_repeat_ngram_size", "repetition_penalty")
"""Settings that read all tokens of a row, padding included."""

_ATTACH = "attach the adapter with pema.attach, and call the model's own generate"
_ALONE = "it would make a text depend on the rest of its batch"
_WHY: dict[str, tuple[str, ...]] = {
    "each source gives one text: repeat the source, and sample with do_sample=True": ("num_return_sequences",),
    f"only texts are returned: {_ATTACH}": (
        *("return_dict_in_generate", "output_scores", "output_logits", "output_attentions", "output_hidden_states"),
        "streamer",
    ),
    "prompts are built from the sources and the template": (
        *("inputs", "input_ids", "attention_mask", "inputs_embeds", "position_ids"),
        *("bos_token_id", "decoder_start_token_id", "forced_bos_token_id", "token_healing", "prefill_chunk_size"),
    ),
    f"assisted decoding supports single texts only: {_ATTACH}": (
        *("assistant_model", "assistant_tokenizer", "num_assistant_tokens", "assistant_early_exit"),
        *("prompt_lookup_num_tokens", "use_mtp", "speculation_type"),
    ),
    "it runs the PLM on a second text in every step, which the adapter does not see": (
        *("guidance_scale", "negative_prompt_ids", "negative_prompt_attention_mask"),
    ),
    "transformers no longer includes it": (
        *("custom_generate", "trust_remote_code", "penalty_alpha", "dola_layers", "low_memory"),
        *("num_beam_groups", "diversity_penalty", "constraints", "force_words_ids"),
    ),
    "it is for encoder-decoder models": ("encoder_repetition_penalty", "encoder_no_repeat_ngram_size"),
    "give the settings by name, e.g. do_sample=True": ("generation_config",),
    "give stop, which ends a text before the string": ("stop_strings",),
    "padding is never read": ("pad_token_id",),
    f"{_ALONE}: give min_new_tokens": ("min_length",),
    f"{_ALONE}: give max_new_tokens": ("forced_eos_token_id",),
    "texts are reordered before decoding, so its batch_id is meaningless: give a logits_processor": (
        "prefix_allowed_tokens_fn",
    ),
}
REFUSED = {name: reason for reason, names in _WHY.items() for name in names}
"""Settings that are not applicable here, with the reason."""


def check(settings: Mapping[str, Any], ends: Sequence[int]) -> None:
    """Check decoding settings before anything is generated.

    Args:
        settings: the settings, by name.
        ends: the end-of-sequence tokens.

    Raises:
        ConfigError: a setting is unknown or not applicable; the message names it, and what to do instead.
    """
    known = GenerationConfig()
    for name, value in settings.items():
        if type(value) in (int, float):
            require(name, value, float, least=-LARGEST, most=LARGEST)
        if name in ARGUMENTS and not isinstance(value, list | tuple | None):
            raise ConfigError(f"{name} must be a list, not a {type(value).__name__}.")
        if name in REFUSED:
            raise ConfigError(f"{name} is not a setting of pema.generate: {REFUSED[name]}.")
        choices = [each for each in KNOWN if each not in HONOURED or hasattr(known, each)]
        among("setting", [name], choices, "pema.generate")
    for names, switch, on in (
        (SAMPLING, "do_sample=True", settings["do_sample"]),
        (BEAMS, "num_beams=2 or more", settings["num_beams"] > 1),
    ):
        idle = [name for name in names if settings.get(name) is not None]
        if idle and not on:
            raise ConfigError(f"{idle[0]} has no effect without {switch}: give both, or neither.")
    if settings.get("cache_implementation") == "paged":
        raise ConfigError("cache_implementation='paged' forms its own batches: leave it out.")
    if not ends and settings.get("stopping_criteria"):
        raise ConfigError(
            "stopping_criteria: the PLM has no end-of-sequence token, so a text that has stopped cannot be padded "
            "until the others finish: give eos_token_id."
        )


_LOCK = threading.Lock()
_BORROWED: dict[int, tuple[int, GenerationConfig]] = {}


@contextlib.contextmanager
def without_own_settings(model: PreTrainedModel) -> Iterator[None]:
    """Ignore the generation settings of the model's folder inside the block; safe with concurrent threads.

    transformers reads every setting that a call leaves out from `model.generation_config`, so it is empty meanwhile.
    """
    # peft passes the settings of its wrapper to the wrapped model.
    inner: Any = model.get_base_model() if hasattr(model, "get_base_model") else model
    with _LOCK:
        count, own = _BORROWED.get(id(inner), (0, inner.generation_config))
        _BORROWED[id(inner)] = count + 1, own
        if not count:
            inner.generation_config = GenerationConfig()
    try:
        yield
    finally:
        with _LOCK:
            count, own = _BORROWED.pop(id(inner))
            if count > 1:
                _BORROWED[id(inner)] = count - 1, own
            else:
                inner.generation_config = own
