"""State of a running call: a call of the model's `generate`, or the values given by `attached.inputs`.

The state is kept in context variables rather than on an object that threads share, so concurrent calls stay separate.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import threading
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from transformers import GenerationConfig, GenerationMixin

from pema.adapter.copying import Keys
from pema.errors import ConfigError
from pema.generation.steps import Weights

DECODING = ("greedy_search", "sample", "beam_search", "beam_sample", "assisted_generation")
"""Decoding modes of `generate` that are part of transformers; the others load their code from elsewhere."""


@dataclass(eq=False)
class Inputs:
    """Values given by one block of `attached.inputs`.

    Attributes:
        owner: the object that the block belongs to.
        lengths: (items,) SL of each input.
        columns: number of positions that the prompt takes.
        outer: the enclosing block.
    """

    owner: object
    lengths: Tensor | None
    columns: int | None
    outer: Inputs | None
    thread: int = field(default_factory=threading.get_ident)


@dataclass(eq=False)
class Call:
    """One call of `generate`.

    Attributes:
        owner: the object that the call belongs to.
        lengths: returns (items,), the number of tokens of each prompt without padding.
        start: number of tokens that the sequence of `generate` holds before the first new token.
        assisted: whether a pass may cover several new tokens.
        own_loop: whether a user-supplied function decodes; it may call the model in any way.
        outer: the enclosing call.
        step: step of the last position of the latest pass made by `generate` itself; None before the first pass.
        prepared: whether `generate` is about to run the model.
        weights: the weights, by number of rows.
        ids: (rows, columns), the tokens that `generate` holds; None before the first pass.
        keys: the prompts, for an adapter that copies; None before the first pass.
    """

    owner: object
    lengths: Callable[[], Tensor]
    start: int
    assisted: bool
    own_loop: bool
    outer: Call | None
    step: int | None = None
    prepared: bool = False
    weights: dict[int, Weights] = field(default_factory=dict)
    ids: Tensor | None = None
    keys: Keys | None = None

    def prepare(self, ids: Tensor) -> None:
        """Record that `generate` prepares a pass for the sequences `ids`, or for a part of the prompts."""
        self.step, self.prepared, self.ids = max(0, ids.shape[1] - self.start), True, ids


_CALL: ContextVar[Call | None] = ContextVar("pema_call", default=None)
_INPUTS: ContextVar[Inputs | None] = ContextVar("pema_inputs", default=None)


def call_of(owner: object) -> Call | None:
    """Return the innermost call of `generate` of `owner` that runs in this context, or None."""
    call: Call | None = _innermost(_CALL.get(), owner)
    return call


def inputs_of(owner: object) -> Inputs | None:
    """Return the innermost block of `owner.inputs` that encloses this context, or None."""
    inputs: Inputs | None = _innermost(_INPUTS.get(), owner)
    return inputs


@contextlib.contextmanager
def running(
    owner: object, lengths: Callable[[], Tensor], start: int, *, assisted: bool, own_loop: bool
) -> Iterator[None]:
    """Mark the block as one call of `generate`."""
    outer = _CALL.get()
    _CALL.set(Call(owner, lengths, start, assisted, own_loop, outer))
    try:
        yield
    finally:
        _CALL.set(outer)


@contextlib.contextmanager
def giving(owner: object, lengths: Tensor | None, columns: int | None) -> Iterator[Inputs]:
    """Set the values of `attached.inputs` inside the block; values left out come from the enclosing block."""
    outer, enclosing = _INPUTS.get(), inputs_of(owner)
    if enclosing is not None:
        lengths = enclosing.lengths if lengths is None else lengths
        columns = enclosing.columns if columns is None else columns
    inputs = Inputs(owner, lengths, columns, outer)
    _INPUTS.set(inputs)
    try:
        yield inputs
    finally:
        _INPUTS.set(outer)


def _innermost(scope: Any, owner: object) -> Any:  # noqa: ANN401
    while scope is not None and scope.owner is not owner:
        scope = scope.outer
    return scope


def arguments_of_generate(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of a call of `generate` by name."""
    return {**dict(zip(_NAMES, args, strict=False)), **kwargs}


_NAMES = tuple(inspect.signature(GenerationMixin.generate).parameters)[1:]


def settings_of(model: Any, arguments: Mapping[str, Any]) -> GenerationConfig:  # noqa: ANN401
    """Return the generation settings in force in a call, built as `generate` itself builds them."""
    others = {name: value for name, value in arguments.items() if name not in _NAMES}
    config = arguments.get("generation_config")
    if config is not None:
        # A pipeline passes both; `generate` itself warns once that this is deprecated.
        config = copy.deepcopy(config)
        others = config.update(**others)
    config, _ = model._prepare_generation_config(config, **others)
    return config


def require_decoding(config: GenerationConfig, arguments: Mapping[str, Any]) -> bool:
    """Return whether decoding is assisted; refuse unsupported decoding modes before anything runs.

    Raises:
        ConfigError: the decoding mode is one for which the mixture is not known to be correct.
    """
    custom = arguments.get("custom_generate")
    if isinstance(custom, str):
        raise ConfigError(
            f"custom_generate={custom!r} loads decoding code that may call the model in any way: while an adapter is "
            "attached, pass a function instead, or detach the adapter."
        )
    if config.cache_implementation == "paged":
        raise ConfigError(
            "cache_implementation='paged' is continuous batching, which packs several requests into one row: while an "
            "adapter is attached, leave it out and pass a padded batch to generate."
        )
    mode = str(getattr(config.get_generation_mode(arguments.get("assistant_model")), "value", ""))
    if mode not in DECODING:
        raise ConfigError(
            f"the decoding mode {mode.replace('_', ' ')} loads code that may call the model in any way: while an "
            "adapter is attached, use greedy decoding, sampling, beam search or assisted decoding."
        )
    if getattr(config, "token_healing", False):
        raise ConfigError("token_healing changes the prompt: leave it out while an adapter is attached.")
    assisted = mode == "assisted_generation"
    if assisted and getattr(config, "guidance_scale", None) not in (None, 1):
        raise ConfigError(
            f"guidance_scale={config.guidance_scale} with assisted decoding scores several tokens against a second "
            "prompt at once, and their steps are unknown: while an adapter is attached, use only one of the two."
        )
    return assisted
