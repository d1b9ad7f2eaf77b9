"""Which steps a forward pass is at, and the weights of its batch."""

from __future__ import annotations

import contextlib
import inspect
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pema.adapter.schedule import Schedule
from pema.errors import ConfigError, OwnerError
from pema.generation import calls
from pema.generation.passes import Pass, Plug
from pema.generation.prompts import lengths_of_call, lengths_of_pass, shown_to
from pema.generation.sequences import Sequence, Sequences
from pema.generation.steps import Weights
from pema.owner.causal_lm import state_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Planner:
    """Finds t of every pass of one model: by the tokens that `generate` holds, or by the state of a loop of one's own.

    Args:
        model: the model, as it was before anything was put over its methods.
        plug: its output head with the adapter.
        schedule: the adapter's weight per step.
        overhead: prompt tokens that are not tokens of the input.
    """

    def __init__(self, model: PreTrainedModel, plug: Plug, schedule: Schedule, overhead: int | None) -> None:
        self._model = model
        self._plug = plug
        self._schedule = schedule
        self._overhead = overhead
        self._signature = inspect.signature(model.forward)
        self._sequences = Sequences()
        self._blocks: list[calls.Inputs] = []

    @contextlib.contextmanager
    def told(self, lengths: Tensor | None, columns: int | None) -> Iterator[None]:
        """What a block of `attached.inputs` says, inside it."""
        with calls.saying(self, lengths, columns) as block:
            self._blocks.append(block)
            try:
                yield
            finally:
                self._blocks.remove(block)

    @contextlib.contextmanager
    def generating(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Iterator[None]:
        """A call of `generate` with these arguments, inside the block.

        Raises:
            ConfigError: a way of decoding that the mixture is not known to be right in.
        """
        arguments = calls.arguments_of_generate(args, kwargs)
        config = calls.settings_of(self._model, arguments)
        assisted = calls.require_decoding(config, arguments)
        state = state_of(arguments)
        before = self._sequences.before(state)
        if before is not None:
            self._sequences.forget(state)

        def lengths() -> Tensor:
            return lengths_of_call(arguments, config.pad_token_id, config.eos_token_id, before)

        ids = arguments.get("inputs") if arguments.get("input_ids") is None else arguments["input_ids"]
        start = ids.shape[1] if ids is not None else 1 if arguments.get("inputs_embeds") is None else 0
        own_loop = arguments.get("custom_generate") is not None
        with calls.running(self, lengths, start, assisted=assisted, own_loop=own_loop):
            yield

    def prepare(self, ids: Tensor | None) -> None:
        """`generate` is about to run the model for the sequence `ids`, or for a part of the prompt."""
        call = calls.call_of(self)
        if call is not None and ids is not None:
            call.prepare(ids.shape[1])

    def plan(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Pass:
        """What the output head is to do in a forward pass."""
        arguments: Mapping[str, Any] = kwargs
        if args:
            arguments = {**self._signature.bind_partial(*args).arguments, **kwargs}
        if arguments.get("labels") is not None:
            raise ConfigError(
                "A loss with an adapter attached would be the PLM's own: leave the labels out, or detach."
            )
        if isinstance(arguments.get("logits_to_keep"), Tensor):
            raise ConfigError("logits_to_keep must be a number with an adapter attached, not a tensor of positions.")
        shown = shown_to(arguments)
        if shown is None:
            raise ConfigError("A forward pass needs input_ids or inputs_embeds.")
        call = calls.call_of(self)
        return self._go_on(arguments, shown) if call is None or call.own_loop else self._in_generate(call, shown)

    def _in_generate(self, call: calls.Call, shown: Tensor) -> Pass:
        """A pass while `generate` runs: its own, or one for a second sequence at the same step."""
        rows, columns = shown.shape[:2]
        own, call.prepared = call.prepared, False
        if not own and call.assisted:
            raise ConfigError(
                "assisted decoding checks several tokens at once, so a pass for anything else has no step: leave the "
                "assistant out, or what runs the model beside it (a logits processor?)."
            )
        if call.step is None:
            raise OwnerError(
                f"{type(self._model).__name__}.generate runs the model in a way of its own: its step is unknown."
            )
        # Where several positions predict new tokens, each of them is at a step of its own.
        most = min(columns, call.step + 1) if call.assisted else 1
        weights = call.weights.get(rows)
        if weights is None:
            weights = call.weights[rows] = self._weights(call.lengths, rows, shown)
        weights.until(call.step)
        return Pass(self._plug, weights, call.step, most, whole=True)

    def _go_on(self, arguments: Mapping[str, Any], shown: Tensor) -> Pass:
        """A pass of a loop of one's own: the prompt, or the tokens behind it."""
        state, block = state_of(arguments), self._block("columns")
        before = self._sequences.before(state)
        said = None if block is None else block.columns
        rows, new = shown.shape[:2]
        held, prompt = (0, new) if before is None else (before.columns, before.prompt)
        prompt = prompt if said is None else said
        if held is None or prompt is None:
            remedy = "say how long the prompt is with `attached.inputs(columns=...)`"
            raise ConfigError(
                "The cache was filled before the adapter was attached, so the step is unknown: "
                f"{'begin with a new one' if held is None else remedy}."
            )
        last = held + new - prompt
        if said is None and before is not None and (new > 1 or last < 0):
            raise ConfigError(
                f"{new} positions behind {held} in the cache may be the rest of the prompt or new tokens: say how long "
                "the prompt is with `attached.inputs(columns=...)`."
            )
        sequence = Sequence(held + new, prompt)
        if before is not None and before.prompt == prompt:
            sequence = replace(before, columns=held + new)
        weights = sequence.weights
        if last >= 0 and (weights is None or weights.rows != rows or sequence.block is not block):
            lengths = sequence.lengths
            if lengths is None and self._reads_prompts():
                lengths = lengths_of_pass(arguments, shown, prompt)
            weights = self._weights(lambda: lengths, rows, shown)  # type: ignore[arg-type, return-value]
            sequence = replace(sequence, lengths=lengths, weights=weights, block=block)
        if last >= 0 and weights is not None:
            weights.until(last)
        count = partial(self._count, state, sequence, said is None)
        return Pass(self._plug, weights if last >= 0 else None, last, last + 1, said is not None, count)

    def _count(self, given: object, sequence: Sequence, needs_state: bool, output: Any) -> None:  # noqa: ANN401
        """Note what the state behind a pass stands for."""
        if isinstance(output, tuple):
            parts = (part for part in output[1:] if part is not None and not isinstance(part, Tensor | tuple))
            state = next(parts, given)
        else:
            state = state_of(output)
        if state is not None:
            self._sequences.count(state, sequence)
        elif needs_state:
            raise ConfigError(
                "Without a cache the step cannot be known: leave use_cache on, call the model's `generate`, or "
                "say how long the prompt is with `attached.inputs(columns=...)`."
            )

    def _weights(self, prompts: Callable[[], Tensor], rows: int, shown: Tensor) -> Weights:
        """The weights of a batch, given what tells the tokens of its prompts."""
        block = self._block("lengths")
        if block is not None and block.lengths is not None:
            lengths = block.lengths
        elif self._overhead is not None:
            lengths = (prompts() - self._overhead).clamp(min=1)
        elif not getattr(self._schedule, "needs_length", True):
            lengths = torch.ones(1, dtype=torch.int64)
        else:
            raise ConfigError(
                f"{type(self._schedule).__name__} needs the length of the input: attach with "
                "overhead=task.template.overhead(tokenizer), or call inside `attached.inputs(source_lengths=...)`."
            )
        return Weights(self._schedule, lengths.to(shown.device), rows)

    def _reads_prompts(self) -> bool:
        """Whether SL comes from the prompts' lengths."""
        block = self._block("lengths")
        return self._overhead is not None and (block is None or block.lengths is None)

    def _block(self, name: str) -> calls.Inputs | None:
        """The block of `inputs` that a call is in.

        Raises:
            ConfigError: it is in none, and another thread has one that says `name`.
        """
        block = calls.inputs_of(self)
        here = threading.get_ident()
        if block is None and any(b.thread != here and getattr(b, name) is not None for b in tuple(self._blocks)):
            raise ConfigError(
                "`attached.inputs` is open in another thread and holds there only: open it in the thread that calls "
                "the model."
            )
        return block
