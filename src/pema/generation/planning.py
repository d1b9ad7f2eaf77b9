"""The steps of a forward pass, and the weights of its batch."""

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
from pema.generation.prompts import input_of, lengths_of_call, lengths_of_pass
from pema.generation.reading import Prompts, Reader
from pema.generation.sequences import Sequence, Sequences
from pema.generation.steps import Weights
from pema.owner.causal_lm import state_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Planner:
    """Planner of the passes of one model: finds the step t of each pass.

    In a call of `generate`, t follows from the tokens that `generate` holds; in a custom loop, from the model's state.

    Args:
        model: the model, before any of its methods are replaced.
        plug: its output head with the adapter.
        schedule: the adapter's weight per step.
        prompt_overhead_tokens: number of prompt tokens that are not source tokens.
        reader: reads the prompts, for an adapter that copies.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        plug: Plug,
        schedule: Schedule,
        prompt_overhead_tokens: int | None,
        reader: Reader | None,
    ) -> None:
        self._model = model
        self._plug = plug
        self._schedule = schedule
        self._overhead = prompt_overhead_tokens
        self._reader = reader
        self._signature = inspect.signature(model.forward)
        self._sequences = Sequences()
        self._blocks: list[calls.Inputs] = []

    @contextlib.contextmanager
    def described(self, lengths: Tensor | None, columns: int | None) -> Iterator[None]:
        """Apply the values of one block of `attached.inputs` inside the block."""
        with calls.giving(self, lengths, columns) as block:
            self._blocks.append(block)
            try:
                yield
            finally:
                self._blocks.remove(block)

    @contextlib.contextmanager
    def generating(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Iterator[None]:
        """Mark the block as a call of `generate` with these arguments.

        Raises:
            ConfigError: the decoding mode is one for which the mixture is not known to be correct.
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
        """Record that `generate` is about to run the model for the sequence `ids`, or for a part of the prompt."""
        call = calls.call_of(self)
        if call is not None and ids is not None:
            call.prepare(ids)

    def plan(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Pass:
        """Return the instructions for the output head in a forward pass with these arguments.

        Raises:
            ConfigError: an argument is not supported while an adapter is attached, or the step is unknown.
            OwnerError: the step is unknown because the model's `generate` runs it in a custom way.
        """
        arguments: Mapping[str, Any] = kwargs
        if args:
            arguments = {**self._signature.bind_partial(*args).arguments, **kwargs}
        if arguments.get("labels") is not None:
            raise ConfigError(
                "the loss would be that of the PLM without the attached adapter: leave the labels out, or detach the "
                "adapter."
            )
        if isinstance(arguments.get("logits_to_keep"), Tensor):
            raise ConfigError(
                "logits_to_keep must be a number while an adapter is attached, not a tensor of positions."
            )
        inputs = input_of(arguments)
        if inputs is None:
            raise ConfigError("a forward pass needs input_ids or inputs_embeds.")
        call = calls.call_of(self)
        return self._in_loop(arguments, inputs) if call is None or call.own_loop else self._in_generate(call, inputs)

    def _in_generate(self, call: calls.Call, inputs: Tensor) -> Pass:
        """Plan a pass while `generate` runs: its own, or one for a second sequence at the same step."""
        rows, columns = inputs.shape[:2]
        own, call.prepared = call.prepared, False
        if not own and call.assisted:
            raise ConfigError(
                "assisted decoding checks several tokens at once, so the step of any other pass is unknown: leave out "
                "the assistant, or whatever else runs the model (a logits processor?)."
            )
        if call.step is None:
            raise OwnerError(
                f"{type(self._model).__name__}.generate runs the model in a custom way, so the step is unknown: use "
                "a model whose generate is that of transformers."
            )
        # Where several positions predict new tokens, each position has its own step.
        most = min(columns, call.step + 1) if call.assisted else 1
        weights = call.weights.get(rows)
        if weights is None:
            weights = call.weights[rows] = self._weights(call.lengths, rows, inputs)
        weights.until(call.step)
        prompts = None if self._reader is None else self._prompts(call, self._reader, rows, own=own)
        return Pass(self._plug, weights, call.step, most, whole=True, prompts=prompts)

    def _prompts(self, call: calls.Call, reader: Reader, rows: int, *, own: bool) -> Prompts:
        """Return what an adapter that copies reads in a pass of `generate`.

        Raises:
            ConfigError: the pass is not of the sequences that `generate` holds, or the prompts are embeddings.
        """
        if not own or call.ids is None or len(call.ids) != rows or not call.start:
            raise ConfigError(
                "this adapter copies tokens of the prompt, and this pass has other prompts than `generate`, or only "
                "embeddings of them: leave out guidance_scale and inputs_embeds, or use an adapter without copying."
            )
        if call.keys is None:
            call.keys = reader.keys(call.ids, call.start, call.lengths())
        return Prompts(reader, call.keys, call.ids[:, call.start :])

    def _in_loop(self, arguments: Mapping[str, Any], inputs: Tensor) -> Pass:
        """Plan a pass of a custom loop: the prompt, or the tokens after it."""
        state, block = state_of(arguments), self._block("columns")
        before = self._sequences.before(state)
        columns = None if block is None else block.columns
        rows, new = inputs.shape[:2]
        prompts = None if self._reader is None else self._prompts_in_loop(self._reader, arguments, rows, columns)
        held, prompt = (0, new) if before is None else (before.columns, before.prompt)
        prompt = prompt if columns is None else columns
        if held is None or prompt is None:
            remedy = "give the length of the prompt with `attached.inputs(columns=...)`"
            raise ConfigError(
                "the cache was filled before the adapter was attached, so the step is unknown: "
                f"{'start with a new cache' if held is None else remedy}."
            )
        last = held + new - prompt
        if columns is None and before is not None and (new > 1 or last < 0):
            raise ConfigError(
                f"{new} positions after {held} in the cache may be the rest of the prompt or new tokens: give the "
                "length of the prompt with `attached.inputs(columns=...)`."
            )
        sequence = Sequence(held + new, prompt)
        if before is not None and before.prompt == prompt:
            sequence = replace(before, columns=held + new)
        weights = sequence.weights
        if last >= 0 and (weights is None or weights.rows != rows or sequence.block is not block):
            lengths = sequence.lengths
            if lengths is None and self._reads_prompts():
                lengths = lengths_of_pass(arguments, inputs, prompt)
            weights = self._weights(lambda: lengths, rows, inputs)  # type: ignore[arg-type, return-value]
            sequence = replace(sequence, lengths=lengths, weights=weights, block=block)
        if last >= 0 and weights is not None:
            weights.until(last)
        count = partial(self._count, state, sequence, columns is None)
        whole = columns is not None
        return Pass(self._plug, weights if last >= 0 else None, last, last + 1, whole, count, prompts=prompts)

    def _prompts_in_loop(self, reader: Reader, arguments: Mapping[str, Any], rows: int, columns: int | None) -> Prompts:
        """Return what an adapter that copies reads in a pass of a custom loop inside `generate`.

        Raises:
            ConfigError: the loop runs outside `generate`, or does not tell the length of the prompt or its tokens.
        """
        call = calls.call_of(self)
        prepared = call is not None and call.prepared
        ids = call.ids if call is not None and prepared else None
        if call is None or ids is None or len(ids) != rows or columns is None:
            raise ConfigError(
                "this adapter copies tokens of the prompt, and this pass does not tell them: call `generate`. A loop "
                "of your own runs as its `custom_generate`, calls `prepare_inputs_for_generation` before each pass, "
                "and gives the length of the prompt with `attached.inputs(columns=...)`."
            )
        call.prepared = False
        lengths = lengths_of_pass(arguments, ids, columns)
        return Prompts(reader, reader.keys(ids, columns, lengths), ids[:, columns:])

    def _count(self, given: object, sequence: Sequence, needs_state: bool, output: Any) -> None:  # noqa: ANN401
        """Record the sequence of the state that a pass returned."""
        if isinstance(output, tuple):
            parts = (part for part in output[1:] if part is not None and not isinstance(part, Tensor | tuple))
            state = next(parts, given)
        else:
            state = state_of(output)
        if state is not None:
            self._sequences.count(state, sequence)
        elif needs_state:
            raise ConfigError(
                "without a cache the step is unknown: leave use_cache on, call the model's `generate`, or give the "
                "length of the prompt with `attached.inputs(columns=...)`."
            )

    def _weights(self, prompts: Callable[[], Tensor], rows: int, inputs: Tensor) -> Weights:
        """Return the weights of a batch; `prompts` returns the number of tokens of each prompt."""
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
                "prompt_overhead_tokens=task.template.prompt_overhead_tokens(tokenizer), or call inside "
                "`attached.inputs(source_lengths=...)`."
            )
        return Weights(self._schedule, lengths.to(inputs.device), rows)

    def _reads_prompts(self) -> bool:
        """Return whether SL is computed from the prompts' lengths."""
        block = self._block("lengths")
        return self._overhead is not None and (block is None or block.lengths is None)

    def _block(self, name: str) -> calls.Inputs | None:
        """Return the block of `attached.inputs` that encloses a call, or None.

        Raises:
            ConfigError: there is none, and another thread has one that gives `name`.
        """
        block = calls.inputs_of(self)
        here = threading.get_ident()
        if block is None and any(b.thread != here and getattr(b, name) is not None for b in tuple(self._blocks)):
            raise ConfigError(
                "`attached.inputs` is open in another thread and applies there only: open it in the thread that calls "
                "the model."
            )
        return block
