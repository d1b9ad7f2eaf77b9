"""What is known of a call while it runs: one of the model's `generate`, or what `attached.inputs` says.

It lies in context variables and not on an object that threads share, so calls that run side by side keep apart.
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

from pema.errors import ConfigError
from pema.generation.steps import Weights

DECODING = ("greedy_search", "sample", "beam_search", "beam_sample", "assisted_generation")
"""The ways of `generate` that are part of transformers; others load their code from elsewhere."""


@dataclass(eq=False)
class Inputs:
    """What a block of `attached.inputs` says.

    Attributes:
        owner: whose block it is.
        lengths: (items,) SL of each input.
        columns: positions that the prompt takes.
        outer: the block around it.
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
        owner: whose call it is.
        lengths: gives the (items,) tokens of each prompt without padding.
        start: tokens in the sequence that `generate` holds before the first new one.
        assisted: whether a pass may be over several new tokens.
        own_loop: whether a function of the user's decodes, which may call the model in any way.
        outer: the call that it is made in.
        step: the step of the last position of generate's own latest pass; None before the first.
        prepared: whether `generate` is about to run the model.
        weights: by number of rows.
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

    def prepare(self, columns: int) -> None:
        """Note that `generate` prepares a pass for a sequence of `columns` tokens, or a part of the prompt."""
        self.step, self.prepared = max(0, columns - self.start), True


_CALL: ContextVar[Call | None] = ContextVar("pema_call", default=None)
_INPUTS: ContextVar[Inputs | None] = ContextVar("pema_inputs", default=None)


def call_of(owner: object) -> Call | None:
    """The innermost call of `generate` of `owner` that runs in this context."""
    call: Call | None = _innermost(_CALL.get(), owner)
    return call


def inputs_of(owner: object) -> Inputs | None:
    """The innermost block of `owner.inputs` that this context is in."""
    inputs: Inputs | None = _innermost(_INPUTS.get(), owner)
    return inputs


@contextlib.contextmanager
def running(
    owner: object, lengths: Callable[[], Tensor], start: int, *, assisted: bool, own_loop: bool
) -> Iterator[None]:
    """A call of `generate`, inside the block."""
    outer = _CALL.get()
    _CALL.set(Call(owner, lengths, start, assisted, own_loop, outer))
    try:
        yield
    finally:
        _CALL.set(outer)


@contextlib.contextmanager
def saying(owner: object, lengths: Tensor | None, columns: int | None) -> Iterator[Inputs]:
    """What `attached.inputs` says, inside the block; what one block leaves out, that around it says."""
    outer, around = _INPUTS.get(), inputs_of(owner)
    if around is not None:
        lengths = around.lengths if lengths is None else lengths
        columns = around.columns if columns is None else columns
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
    """The arguments of a call of `generate` by their names."""
    return {**dict(zip(_NAMES, args, strict=False)), **kwargs}


_NAMES = tuple(inspect.signature(GenerationMixin.generate).parameters)[1:]


def settings_of(model: Any, arguments: Mapping[str, Any]) -> GenerationConfig:  # noqa: ANN401
    """The generation settings in force in a call, as `generate` itself makes them."""
    others = {name: value for name, value in arguments.items() if name not in _NAMES}
    config = arguments.get("generation_config")
    if config is not None:
        # A pipeline gives both; `generate` itself says once that it is deprecated.
        config = copy.deepcopy(config)
        others = config.update(**others)
    config, _ = model._prepare_generation_config(config, **others)
    return config


def require_decoding(config: GenerationConfig, arguments: Mapping[str, Any]) -> bool:
    """Whether decoding is assisted.

    Raises:
        ConfigError: a way of decoding that the mixture is not known to be right in; before anything runs.
    """
    custom = arguments.get("custom_generate")
    if isinstance(custom, str):
        raise ConfigError(
            f"custom_generate={custom!r} loads decoding code that may use the model in any way: with an adapter "
            "attached give a function instead, or detach."
        )
    if config.cache_implementation == "paged":
        raise ConfigError(
            "cache_implementation='paged' is continuous batching, which packs several requests into a row: with an "
            "adapter attached leave it out and give generate a padded batch."
        )
    mode = str(getattr(config.get_generation_mode(arguments.get("assistant_model")), "value", ""))
    if mode not in DECODING:
        raise ConfigError(
            f"Decoding by {mode.replace('_', ' ')} loads code that may use the model in any way: with an adapter "
            "attached use greedy decoding, sampling, beams or assisted decoding."
        )
    if getattr(config, "token_healing", False):
        raise ConfigError("token_healing changes the prompt: with an adapter attached leave it out.")
    assisted = mode == "assisted_generation"
    if assisted and getattr(config, "guidance_scale", None) not in (None, 1):
        raise ConfigError(
            f"guidance_scale={config.guidance_scale} with assisted decoding scores several tokens against a second "
            "prompt at once, whose steps cannot be known: with an adapter attached use one of the two."
        )
    return assisted
