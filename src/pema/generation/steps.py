"""Which generated token a position of a forward pass predicts, and the adapter's weight there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pema.errors import ConfigError, OwnerError
from pema.generation.mixture import log_weights
from pema.generation.schedule import Schedule
from pema.owner.state import state_of

BLOCK = 64
"""Steps whose weights are computed at once."""


@dataclass(frozen=True)
class Prompts:
    """The prompts of one batch.

    Attributes:
        columns: positions that the (padded) prompts take; the last one predicts t = 0.
        lengths: (items,) int64, tokens of each prompt without its padding.
    """

    columns: int
    lengths: Tensor


class Weights:
    """lambda per row and step of one batch, computed in blocks of steps; row r belongs to item r // (rows / items).

    `generate` expands an item to its beams or samples side by side and reorders beams within an item only, so an
    item's input length stays with its rows.
    """

    def __init__(self, schedule: Schedule, input_lengths: Tensor, rows: int) -> None:
        if rows % len(input_lengths):
            raise ConfigError(
                f"There are {len(input_lengths)} input lengths for a batch of {rows} rows: give one per input."
            )
        self._schedule = schedule
        self._lengths = input_lengths.repeat_interleave(rows // len(input_lengths))[:, None]
        self.rows = rows
        self._table = torch.empty(rows, 0)
        self._logs = torch.empty(rows, 0, 2)
        self._smallest: list[float] = []
        self._largest: list[float] = []

    def until(self, step: int) -> None:
        """Compute the weights of the steps up to `step`."""
        while step >= len(self._smallest):
            start = len(self._smallest)
            steps = torch.arange(start, start + BLOCK, device=self._lengths.device)[None]
            block = self._schedule.weights(steps, self._lengths).float().expand(self.rows, BLOCK)
            if not bool(((block >= 0) & (block <= 1)).all()):
                raise ConfigError(f"{type(self._schedule).__name__} gives weights outside [0, 1].")
            self._table = torch.cat((self._table.to(block.device), block), dim=1)
            self._logs = torch.cat((self._logs.to(block.device), log_weights(block)), dim=1)
            smallest, largest = block.aminmax(dim=0)
            self._smallest += smallest.tolist()
            self._largest += largest.tolist()

    def none(self, first: int, last: int) -> bool:
        """Whether no row gives the adapter any weight at the steps first .. last."""
        return not any(self._largest[first : last + 1])

    def all(self, first: int, last: int) -> bool:
        """Whether every row gives the adapter all the weight at the steps first .. last."""
        return all(weight == 1 for weight in self._smallest[first : last + 1])

    def some_none(self, first: int, last: int) -> bool:
        """Whether a row gives the adapter no weight at one of the steps first .. last."""
        return not all(self._smallest[first : last + 1])

    def table(self, first: int, last: int) -> Tensor:
        """(rows, k) lambda at the k steps first .. last."""
        return self._table[:, first : last + 1]

    def logs(self, first: int, last: int) -> Tensor:
        """(rows, 2 k, 1): log(1 - lambda) of the k steps first .. last, then log(lambda) of the same."""
        return self._logs[:, first : last + 1].transpose(1, 2).reshape(self.rows, -1, 1)


def prompts_of_call(inputs: Tensor | None, kwargs: dict[str, Any], pad: int | None, ends: list[int]) -> Prompts | None:
    """The prompts that a call of `generate` is given, read the way that `generate` reads them.

    Args:
        inputs: the first argument of `generate`.
        kwargs: its other arguments.
        pad: the model's padding token.
        ends: its end-of-sequence tokens.
    """
    ids = inputs if inputs is not None else kwargs.get("input_ids")
    embeddings = kwargs.get("inputs_embeds")
    shown = embeddings if embeddings is not None else ids
    if shown is None:
        return None
    past, (rows, columns) = cache_length(state_of(kwargs)), shown.shape[:2]
    mask = kwargs.get("attention_mask")
    if mask is not None:
        return Prompts(mask.shape[1], mask.sum(-1))
    if columns <= past:
        columns += past
    if shown.ndim == 2 and pad is not None and pad not in ends and bool((shown == pad).any()):
        return Prompts(columns, (shown != pad).sum(-1) + columns - shown.shape[1])
    return Prompts(columns, torch.full((rows,), columns, device=shown.device))


def prompts_of_forward(kwargs: dict[str, Any], rows: int, columns: int, device: torch.device) -> Prompts:
    """The prompts of a forward pass with an empty cache: all that it is given."""
    mask = kwargs.get("attention_mask")
    if isinstance(mask, Tensor) and mask.ndim == 2:
        return Prompts(columns, mask.sum(-1))
    positions = kwargs.get("position_ids")
    if mask is not None and isinstance(positions, Tensor) and positions.ndim == 2:
        return Prompts(columns, (positions[:, -1] + 1).expand(rows))
    if mask is not None:
        raise ConfigError(
            "The prompts' lengths cannot be read from an attention mask that is not (batch, length): call the model's "
            "`generate`, or give them with `attached.inputs(...)`."
        )
    return Prompts(columns, torch.full((rows,), columns, device=device))


def cache_length(cache: object) -> int:
    """Positions that a cache holds.

    Raises:
        OwnerError: a cache that cannot say.
    """
    if cache is None:
        return 0
    if not hasattr(cache, "get_seq_length"):
        raise OwnerError(f"A cache of type {type(cache).__name__} does not say its length: use a DynamicCache.")
    return int(cache.get_seq_length())
