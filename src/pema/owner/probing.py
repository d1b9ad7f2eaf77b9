"""Passes of a model under observation: without dropout, with hooks, and with a changed input of the head."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from pema.errors import OwnerError
from pema.owner.weights import device_of


@contextlib.contextmanager
def evaluating(model: PreTrainedModel) -> Iterator[None]:
    """Switch off dropout and gradients inside the block; restore the model's mode afterwards."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)


@contextlib.contextmanager
def hooked(*handles: RemovableHandle) -> Iterator[None]:
    """Remove forward hooks at the end of the block, also after an error."""
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def random_tokens(model: PreTrainedModel, seed: int, rows: int = 2, length: int = 6) -> Tensor:
    """Draw random tokens (rows, length), the same for every call with the same seed."""
    size = model.get_input_embeddings().weight.shape[0]
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, size, (rows, length), generator=generator)
    padding = getattr(model.config, "pad_token_id", None)
    if padding is not None and size > 1:
        tokens[tokens == padding] = (padding + 1) % size
    return tokens.to(device_of(model))


def run_head(
    model: PreTrainedModel, embedding: nn.Module, tokens: Tensor, change: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """Run a forward pass with a changed head input; return that input (n, d) and the logits (n, V), on the CPU."""
    seen: list[Tensor] = []

    def hook(_module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        f = change(arguments[0])
        seen.append(f)
        return (f, *arguments[1:])

    with hooked(embedding.register_forward_pre_hook(hook)):
        logits = model(input_ids=tokens, use_cache=False).logits
    if len(seen) != 1 or seen[0].shape[:-1] != logits.shape[:-1]:
        raise OwnerError(
            f"{type(model).__name__} is not supported: its output embedding ran {len(seen)} times in one forward pass."
            if len(seen) != 1
            else f"{type(model).__name__} is not supported: its output embedding reads {tuple(seen[0].shape)}, but the "
            f"model's logits have shape {tuple(logits.shape)}."
        )
    return seen[0].flatten(0, -2).cpu(), logits.flatten(0, -2).float().cpu()
