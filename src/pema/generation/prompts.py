"""How long the prompts of a batch are, in tokens without their padding."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pema.errors import ConfigError
from pema.generation.sequences import Sequence


def shown_to(arguments: Mapping[str, Any]) -> Tensor | None:
    """What a forward pass or a call of `generate` is given: (rows, columns) tokens or (rows, columns, d) embeddings."""
    embeddings, ids, inputs = (arguments.get(name) for name in ("inputs_embeds", "input_ids", "inputs"))
    return next((given for given in (embeddings, ids, inputs) if given is not None), None)


def lengths_of_call(
    arguments: Mapping[str, Any], pad: int | None, ends: int | list[int] | None, before: Sequence | None
) -> Tensor:
    """(items,) tokens of each prompt that a call of `generate` is given, read the way that `generate` reads them.

    Args:
        arguments: those of the call, by name.
        pad: the padding token in force.
        ends: the end-of-sequence tokens in force.
        before: what the state in the arguments stands for.

    Raises:
        ConfigError: they go on from a state that does not say its length.
    """
    shown, mask = shown_to(arguments), arguments.get("attention_mask")
    if mask is not None:
        lengths: Tensor = mask.sum(-1)
        return lengths
    if shown is None:
        # `generate` begins with one token, beginning of sequence.
        return torch.ones(1, dtype=torch.int64)
    held = 0
    if before is not None:
        if before.columns is None:
            raise ConfigError(
                "The state that generate goes on from does not say its length, so that of the prompt cannot be known: "
                "give an attention mask over the whole prompt, or call inside `attached.inputs(source_lengths=...)`."
            )
        # A state of linear attention is followed by new tokens only; the others by the whole prompt, or by new tokens.
        held = before.columns if not before.tells or shown.shape[1] <= before.columns else 0
    if shown.ndim == 2 and pad is not None and pad not in (ends if isinstance(ends, list) else [ends]):
        return (shown != pad).sum(-1) + held
    return torch.full((len(shown),), shown.shape[1] + held, device=shown.device)


def lengths_of_pass(arguments: Mapping[str, Any], shown: Tensor, columns: int) -> Tensor:
    """(rows,) tokens of each prompt in a forward pass whose first `columns` positions are the prompts.

    Raises:
        ConfigError: the pass has an attention mask from which they cannot be read.
    """
    mask, positions = arguments.get("attention_mask"), arguments.get("position_ids")
    if isinstance(mask, Tensor) and mask.ndim == 2 and mask.shape[1] >= columns:
        lengths: Tensor = mask[:, :columns].sum(-1)
        return lengths
    if mask is not None and isinstance(positions, Tensor) and positions.ndim == 2 and shown.shape[1] == columns:
        return (positions[:, -1] + 1).expand(len(shown))
    if mask is not None:
        raise ConfigError(
            "The prompts' lengths cannot be read from an attention mask that is not (batch, length): call the model's "
            "`generate`, or give them with `attached.inputs(source_lengths=...)`."
        )
    return torch.full((len(shown),), columns, device=shown.device)
