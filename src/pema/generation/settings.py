"""Settings of decoding: the user's and ours, never those that a PLM's folder brings along."""

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
        *("eos_token_id", "min_new_tokens", "max_time", "stop_strings", "exponential_decay_length_penalty"),
        *("repetition_penalty", "no_repeat_ngram_size", "bad_words_ids", "sequence_bias", "watermarking_config"),
        *("suppress_tokens", "begin_suppress_tokens", "remove_invalid_values", "renormalize_logits"),
        *("use_cache", "cache_implementation", "cache_config", "compile_config", "disable_compile"),
    )
)
"""Fields of transformers' GenerationConfig that decode as they say, for every text as if it were alone."""

ARGUMENTS = ("logits_processor", "stopping_criteria")
"""Arguments of the model's `generate` that are passed on, beside ours."""

STOPS = ("stop_strings", "stopping_criteria")

KNOWN = sorted({*HONOURED, *ARGUMENTS, "max_length", *(field.name for field in fields(GenerateConfig))})
"""What `generate` may be given."""

OF_THE_HISTORY = ("logits_processor", "no_repeat_ngram_size", "repetition_penalty")
"""Settings that look at all tokens of a row, padding included."""

_ATTACH = "attach the adapter with pema.attach, and call the model's own generate"
_ALONE = "it would make a text depend on what else is in its batch"
_WHY: dict[str, tuple[str, ...]] = {
    "one text comes of each source: give a source several times, and sample with do_sample=True": (
        "num_return_sequences",
    ),
    f"texts come back: {_ATTACH}": (
        *("return_dict_in_generate", "output_scores", "output_logits", "output_attentions", "output_hidden_states"),
        "streamer",
    ),
    "prompts are made of the sources and the template": (
        *("inputs", "input_ids", "attention_mask", "inputs_embeds", "position_ids"),
        *("bos_token_id", "decoder_start_token_id", "forced_bos_token_id", "token_healing", "prefill_chunk_size"),
    ),
    f"drafting decodes single texts: {_ATTACH}": (
        *("assistant_model", "assistant_tokenizer", "num_assistant_tokens", "assistant_early_exit"),
        *("prompt_lookup_num_tokens", "use_mtp", "speculation_type"),
    ),
    "it asks the PLM for a second text in every step, of which the adapter knows nothing": (
        *("guidance_scale", "negative_prompt_ids", "negative_prompt_attention_mask"),
    ),
    "transformers no longer holds it": (
        *("custom_generate", "trust_remote_code", "penalty_alpha", "dola_layers", "low_memory"),
        *("num_beam_groups", "diversity_penalty", "constraints", "force_words_ids"),
    ),
    "it is for encoder-decoder models": ("encoder_repetition_penalty", "encoder_no_repeat_ngram_size"),
    "give the settings by name, e.g. do_sample=True": ("generation_config",),
    "padding is never read": ("pad_token_id",),
    f"{_ALONE}: give min_new_tokens": ("min_length",),
    f"{_ALONE}: give max_new_tokens": ("forced_eos_token_id",),
    "texts are decoded in an order of their own, so its batch_id means nothing: give a logits_processor": (
        "prefix_allowed_tokens_fn",
    ),
}
REFUSED = {name: reason for reason, names in _WHY.items() for name in names}
"""Settings that cannot be meant here, and why."""


def check(settings: Mapping[str, Any], ends: Sequence[int]) -> None:
    """Refuse settings of decoding that cannot be meant, before anything is generated.

    Args:
        settings: by name.
        ends: the tokens that end a sequence.

    Raises:
        ConfigError: names the setting, and what to do instead.
    """
    known = GenerationConfig()
    for name, value in settings.items():
        if type(value) in (int, float):
            require(name, value, float, least=-LARGEST, most=LARGEST)
        if name in ARGUMENTS and not isinstance(value, list | tuple | None):
            raise ConfigError(f"{name} must be a list, not a {type(value).__name__}.")
        if name in REFUSED:
            raise ConfigError(f"{name} is no setting of pema.generate: {REFUSED[name]}.")
        among([each for each in KNOWN if each not in HONOURED or hasattr(known, each)], [name], "pema.generate")
    for names, switch, on in (
        (SAMPLING, "do_sample=True", settings["do_sample"]),
        (BEAMS, "num_beams=2 or more", settings["num_beams"] > 1),
    ):
        idle = [name for name in names if settings.get(name) is not None]
        if idle and not on:
            raise ConfigError(f"{idle[0]} does nothing without {switch}: give both, or neither.")
    if settings.get("cache_implementation") == "paged":
        raise ConfigError("cache_implementation='paged' decodes in batches of its own: leave it out.")
    if not ends and any(settings.get(name) for name in STOPS):
        raise ConfigError(
            f"{' and '.join(name for name in STOPS if settings.get(name))}: the PLM has no end-of-sequence token, so a "
            "text that has stopped cannot wait for the others: give eos_token_id."
        )


_LOCK = threading.Lock()
_BORROWED: dict[int, tuple[int, GenerationConfig]] = {}


@contextlib.contextmanager
def without_own_settings(model: PreTrainedModel) -> Iterator[None]:
    """Decode as if the model's folder held no generation settings; threads may do so at the same time.

    transformers takes every setting that a call leaves out from `model.generation_config`, so it is empty meanwhile.
    """
    # peft hands the settings of its wrapper to the model inside.
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
