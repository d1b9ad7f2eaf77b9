"""Loading of transformers causal LMs and their tokenizers, with one-line error messages."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from pema.console import note
from pema.devices import device_named, has_bfloat16
from pema.errors import ConfigError, OwnerError
from pema.extras import installs
from pema.owner.sources.names import CAUSAL, known_names, resolve
from pema.owner.weights import Fingerprints
from pema.tasks.chat import end_of_turn

NO_LIMIT = 1_000_000

DeviceMap = str | torch.device | Mapping[str, int | str | torch.device] | None
"""Device placement as transformers takes it."""

SEVERAL = ("auto", "balanced", "balanced_low_0", "sequential")
"""Placements by accelerate, on several devices if the model needs them."""


class Loaded(NamedTuple):
    """A loaded model.

    Attributes:
        model: the model, in evaluation mode.
        tokenizer: its tokenizer.
        name: name of the PLM.
        weights: how its weights were quantised; empty if they were not.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name: str
    weights: str


def load(name: str | Path, *, dtype: str | torch.dtype | None, device_map: DeviceMap, revision: str | None) -> Loaded:
    """Load a model in evaluation mode and its tokenizer.

    Raises:
        OwnerError: either cannot be loaded, or weights are missing in the checkpoint.
        ConfigError: `dtype` is not a floating-point type.
        AdapterError: this machine has no such device.
    """
    place, called, weights = dataclasses.astuple(resolve(name))
    device = _one_device(device_map)
    has_accelerate = find_spec("accelerate") is not None
    if device_map is not None and device is None and not has_accelerate:
        raise OwnerError(f"device_map={device_map} needs the accelerate library: {installs('device-map')}.")
    common = _common(revision)
    options: dict[str, Any] = {"device_map": device_map} if device_map is not None and has_accelerate else {}
    wanted, unsaid = _dtype(dtype, device_map), False
    try:
        if wanted is None:
            stored = AutoConfig.from_pretrained(place, **common).dtype
            wanted, unsaid = _fastest(called, stored), stored is None
    except Exception as error:
        raise _unloadable(called, CAUSAL, error) from error
    model, tokenizer = load_as(AutoModelForCausalLM, CAUSAL, place, called, revision=revision, dtype=wanted, **options)
    if unsaid and _fastest(called, model.dtype) == torch.float32:  # only the weights say what they are stored in
        model = model.float()
    if device is not None:  # transformers places nothing without accelerate
        model = model.to(device)
    return Loaded(model, tokenizer, called, weights)


def load_as(
    kind: type[AutoModelForCausalLM | AutoModelForSequenceClassification],
    what: str,
    place: str,
    called: str,
    *,
    revision: str | None = None,
    **options: Any,  # noqa: ANN401
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a model in evaluation mode with all of its weights, and its tokenizer.

    Args:
        kind: class of transformers that loads it.
        what: kind of model, with its article, for the messages.
        place: hub name or folder.
        called: name of the model, for the messages.
        revision: revision of the hub's repository.
        options: further options of the model's `from_pretrained`.

    Raises:
        OwnerError: either cannot be loaded, or weights are missing in the checkpoint.
    """
    common = _common(revision)
    try:
        # All other weight formats are pickles, which can execute code when they are read.
        options |= {"output_loading_info": True, "use_safetensors": True}
        model, info = kind.from_pretrained(place, **options, **common)
    except Exception as error:  # transformers raises OSError, ValueError, KeyError, ImportError and safetensors' own.
        raise _unloadable(called, what, error) from error
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise OwnerError(
            f"{called} lacks {len(missing)} of the weights of {type(model).__name__} ({missing[0]}, ...): they "
            f"would be random. Give the checkpoint of {what}."
        )
    return model.eval(), _tokenizer(place, called, common)


def load_tokenizer(name: str | Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model by its name, without its weights; see `resolve`.

    Raises:
        OwnerError: it cannot be loaded.
    """
    source = resolve(name)
    return _tokenizer(source.place, source.name, _common(None))


def _tokenizer(place: str, called: str, common: Mapping[str, Any]) -> PreTrainedTokenizerBase:
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(place, **common)
    except Exception as error:
        raise OwnerError(f"the tokenizer of {called} cannot be loaded: {_first_line(error)}") from error
    return tokenizer


def _unloadable(name: str, what: str, error: Exception) -> OwnerError:
    return OwnerError(f"{name} cannot be loaded as {what}: {_first_line(error)}{known_names(name)}")


def _common(revision: str | None) -> dict[str, Any]:
    # Set explicitly: by default the library asks on the terminal. Code from a model repository is never executed.
    return {"trust_remote_code": False} | ({} if revision is None else {"revision": revision})


def name_of(model: PreTrainedModel) -> str:
    """Return a name for a model that was loaded elsewhere: its hub name, its folder's last component, or its class."""
    name = str(getattr(model.config, "_name_or_path", "") or "").rstrip("/")
    if not name:
        return type(model).__name__
    return Path(name).name if Path(name).is_absolute() or Path(name).is_dir() else name


def max_length(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the maximum tokens of a context; `NO_LIMIT` if neither configuration nor tokenizer sets one."""
    config = model.config.get_text_config()
    for field in ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "n_ctx"):
        value = getattr(config, field, None)
        if isinstance(value, int) and value > 0:
            return value
    return min(int(getattr(tokenizer, "model_max_length", NO_LIMIT)), NO_LIMIT)


def eos_token_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Return all tokens that end a sequence: of the model's generation config, the tokenizer, and its chat template."""
    tokens: set[int] = set()
    generation = getattr(model, "generation_config", None)
    for value in (getattr(generation, "eos_token_id", None), tokenizer.eos_token_id, end_of_turn(tokenizer)):
        if value is not None:
            tokens.update([value] if isinstance(value, int) else value)
    if not tokens:
        value = model.config.get_text_config().eos_token_id
        tokens.update([] if value is None else [value] if isinstance(value, int) else value)
    return tuple(sorted(token for token in tokens if token >= 0))


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the SHA-256 of the tokenizer; see `tokenizer_fingerprints`."""
    return tokenizer_fingerprints(tokenizer).current


def tokenizer_fingerprints(tokenizer: PreTrainedTokenizerBase) -> Fingerprints:
    """Return the SHA-256 of everything that determines the tokens of a text.

    That is vocabulary, merges, normaliser, pre-tokeniser, post-processor, decoder, added tokens, and the BOS, EOS and
    unknown tokens. Padding and truncation do not change the tokens of a text, so the padding token does not count.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        content = json.loads(backend.to_str())
        # Padding and truncation settings of the last call are state, not part of the tokenizer.
        content.pop("padding", None)
        content.pop("truncation", None)
    else:
        content = {"vocabulary": tokenizer.get_vocab(), "class": type(tokenizer).__name__}
    special = {name: str(getattr(tokenizer, name, None)) for name in ("bos_token", "eos_token", "unk_token")}
    before, after = _text(content | {"special": special | {"pad_token": _PLACE}}).split(
        f'"pad_token": {_text(_PLACE)}, '
    )
    current = hashlib.sha256((before + after).encode()).hexdigest()
    # In earlier versions the padding token counted: the tokenizer's own, None, or another token used in its place.
    pads = {str(getattr(tokenizer, "pad_token", None)), "None", *special.values(), *_added(tokenizer)}
    whole = (f'{before}"pad_token": {_text(pad)}, {after}' for pad in sorted(pads))
    earlier = [hashlib.sha256(text.encode()).hexdigest() for text in whole]
    return Fingerprints(current, tuple(value for value in earlier if value != current))


def _dtype(dtype: str | torch.dtype | None, device_map: DeviceMap) -> str | torch.dtype | None:
    """Return the type to load in; None means that the checkpoint and the processor decide."""
    if isinstance(dtype, str) and dtype != "auto":
        parsed = getattr(torch, dtype, None)
        if not isinstance(parsed, torch.dtype) or not parsed.is_floating_point:
            raise ConfigError(
                f"dtype {dtype!r} is not a floating-point type: use 'auto', 'float32', 'bfloat16', 'float16'."
            )
        return parsed
    if dtype is not None:
        return dtype
    on_cpu = device_map in (None, "cpu") or not (torch.cuda.is_available() or torch.backends.mps.is_available())
    return None if on_cpu else "auto"


def _one_device(device_map: DeviceMap) -> torch.device | None:
    """Return the device of a placement on one device; None if there is no placement, or accelerate decides on it."""
    if isinstance(device_map, str) and device_map not in SEVERAL:
        return device_named(device_map, "device_map")
    return device_map if isinstance(device_map, torch.device) else None


def _fastest(name: str, stored: torch.dtype | None) -> str | torch.dtype:
    """Return the type that the processor computes in without rounding weights: the stored one, or float32 for halves.

    float16 becomes float32 on every processor: one that is fast in bfloat16 is slow in float16, and bfloat16 would
    round the weights.
    """
    if stored not in (torch.float16, torch.bfloat16):
        return "auto"
    if stored == torch.bfloat16 and has_bfloat16(torch.device("cpu")):
        return "auto"
    own = str(stored).removeprefix("torch.")
    note(f"{name}: stored in {own}, computed in float32, because this processor is slow in {own} (dtype auto: {own}).")
    return torch.float32


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


_PLACE = "\0pad\0"


def _added(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Return the added tokens that look like padding tokens."""
    tokens = getattr(tokenizer, "added_tokens_decoder", None) or {}
    return [str(token) for token in tokens.values() if "pad" in str(token).lower()]


def _text(content: object) -> str:
    return json.dumps(content, sort_keys=True, default=str)
