"""Lengths of the prompts of a batch, in tokens without padding."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pema.errors import ConfigError
from pema.generation.sequences import Sequence


def input_of(arguments: Mapping[str, Any]) -> Tensor | None:
    """Return the input of a forward pass or a call of `generate`: tokens (rows, columns) or embeddings (..., d)."""
    embeddings, ids, inputs = (arguments.get(name) for name in ("inputs_embeds", "input_ids", "inputs"))
    return next((given for given in (embeddings, ids, inputs) if given is not None), None)


def lengths_of_call(
    arguments: Mapping[str, Any], pad: int | None, ends: int | list[int] | None, before: Sequence | None
) -> Tensor:
    """Return (items,), the number of tokens of each prompt of a call of `generate`, read as `generate` reads them.

    Args:
        arguments: the arguments of the call, by name.
        pad: the padding token in force.
        ends: the end-of-sequence tokens in force.
        before: the sequence of the state in the arguments.

    Raises:
        ConfigError: the prompts continue from a state that does not report its length.
    """
    given, mask = input_of(arguments), arguments.get("attention_mask")
    if mask is not None:
        lengths: Tensor = mask.sum(-1)
        return lengths
    if given is None:
        # `generate` starts with one token, beginning of sequence.
        return torch.ones(1, dtype=torch.int64)
    held = 0
    if before is not None:
        if before.columns is None:
            raise ConfigError(
                "the state that generate continues from does not report its length, so the length of the prompt is "
                "unknown: give an attention mask over the whole prompt, or call inside "
                "`attached.inputs(source_lengths=...)`."
            )
        # A state of linear attention is followed by new tokens only; the others by the whole prompt, or by new tokens.
        held = before.columns if not before.tells or given.shape[1] <= before.columns else 0
    if given.ndim == 2 and pad is not None and pad not in (ends if isinstance(ends, list) else [ends]):
        return (given != pad).sum(-1) + held
    return torch.full((len(given),), given.shape[1] + held, device=given.device)


def lengths_of_pass(arguments: Mapping[str, Any], given: Tensor, columns: int) -> Tensor:
    """Return (rows,), the number of tokens of each prompt in a pass whose first `columns` positions are the prompts.

    Raises:
        ConfigError: the attention mask of the pass does not tell the lengths.
    """
    mask, positions = arguments.get("attention_mask"), arguments.get("position_ids")
    if isinstance(mask, Tensor) and mask.ndim == 2 and mask.shape[1] >= columns:
        lengths: Tensor = mask[:, :columns].sum(-1)
        return lengths
    if mask is not None and isinstance(positions, Tensor) and positions.ndim == 2 and given.shape[1] == columns:
        return (positions[:, -1] + 1).expand(len(given))
    if mask is not None:
        raise ConfigError(
            "the prompts' lengths cannot be read from an attention mask that is not (batch, length): call the model's "
            "`generate`, or give them with `attached.inputs(source_lengths=...)`."
        )
    return torch.full((len(given),), columns, device=given.device)
