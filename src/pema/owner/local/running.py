"""Forward passes of an unmodified transformers causal LM that read f(c) at the tap."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from pema.devices import fetched
from pema.owner.batching import pad_right
from pema.owner.causal_lm import output_embedding, state_argument, state_of
from pema.owner.contract import Tap
from pema.owner.derivation import find_final_norm
from pema.owner.local.prefix import Prefix
from pema.owner.positions import PositionEncoding
from pema.owner.probing import hooked
from pema.owner.weights import device_of


class Runner:
    """A runner of forward passes of one model.

    f(c) is read by a hook at the tap, so every architecture works unmodified.

    Attributes:
        model: the transformers model, in evaluation mode.
        tap: where representations are read.
        eos: tokens that end a sequence.
        positions: which lengths may share keys and passes.
    """

    def __init__(self, model: PreTrainedModel, tap: Tap, eos: tuple[int, ...]) -> None:
        self.model = model
        self.tap: Tap = tap
        self.eos = eos
        self.takes_positions = "position_ids" in inspect.signature(model.forward).parameters
        self.state_argument = state_argument(model)
        self.positions = PositionEncoding(model)

    def forward(
        self,
        tokens: Tensor,
        select: Callable[[Tensor], Tensor],
        *,
        head: Callable[[Tensor], Tensor] | None = None,
        **arguments: object,
    ) -> tuple[Tensor, CausalLMOutputWithPast]:
        """Run a forward pass that reads the tap and skips the LM head.

        Args:
            tokens: (rows, length).
            select: selects from the (rows, length, d_tap) at the tap.
            head: selects the input of the LM head from (rows, length, d); None selects nothing.
            arguments: further arguments of the model.

        Returns:
            The result of `select`, and the model's output.
        """
        self.positions.settle()
        seen: list[Tensor] = []
        embedding = output_embedding(self.model)
        keep = head or (lambda x: x[..., :0, :])

        def at_tap(_module: nn.Module, given: tuple[Any, ...]) -> None:
            seen.append(select(given[0]))

        def at_head(_module: nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...]:
            return (keep(given[0]), *given[1:])

        handles = [self.tapped.register_forward_pre_hook(at_tap), embedding.register_forward_pre_hook(at_head)]
        with hooked(*handles):
            output = self.model(input_ids=tokens.to(device_of(self.model)), **arguments)
        return seen[0], output

    def state(self, state: object) -> dict[str, Any]:
        """Return the argument of a forward pass that continues from `state`; empty for a model without state."""
        return {} if self.state_argument is None else {self.state_argument: state}

    @torch.inference_mode()
    def teacher(self, rows: Sequence[Sequence[int]], starts: Sequence[int], prefix: Prefix | None) -> Tensor:
        """Represent every context of row i with at least starts[i] tokens, in one forward pass.

        A causal model never attends to padding on the right, so no mask is needed and fast attention can be used. All
        rows and the prefix have the same position encoding.

        Returns:
            (sum of len(row) - start + 1, d_tap) representations, on the CPU.
        """
        tokens = pad_right(rows)
        width = tokens.shape[1]
        wanted = torch.cat(
            [
                torch.arange(start - 1, len(row)) + i * width
                for i, (row, start) in enumerate(zip(rows, starts, strict=True))
            ]
        )
        arguments: dict[str, Any] = {"use_cache": False}
        if prefix is not None:
            arguments = {"use_cache": True, **self.state(prefix.expanded(len(rows)))}
        representations, _ = self.forward(
            tokens, lambda x: x.flatten(0, -2).index_select(0, wanted.to(x.device)), **arguments
        )
        return fetched(representations)

    @torch.inference_mode()
    def prefix(self, tokens: Sequence[int]) -> Prefix | None:
        """Compute the cache of the common prefix of all contexts; None if this kind of cache cannot be shared.

        It runs the model below its output head, so an adapter at the head has no part in it.
        """
        self.positions.settle()
        row = torch.tensor([list(tokens)], device=device_of(self.model))
        output = self.model.base_model(input_ids=row, use_cache=True)
        cache = state_of(output)
        return Prefix(cache, len(tokens)) if Prefix.understands(cache) else None

    @cached_property
    def tapped(self) -> nn.Module:
        """Module whose input is f(c): the LM head, or the norm in front of it."""
        return output_embedding(self.model) if self.tap == "head_input" else find_final_norm(self.model).module
