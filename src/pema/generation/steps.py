"""The adapter's weight per row and step of one batch."""

from __future__ import annotations

import torch
from torch import Tensor

from pema.adapter.schedule import Schedule
from pema.errors import ConfigError
from pema.generation.mixture import log_weights

BLOCK = 64
"""Steps whose weights are computed at once."""


class Weights:
    """lambda per row and step of one batch, computed in blocks of steps; row r belongs to item r // (rows / items).

    `generate` expands an item to adjacent beams or samples and reorders beams within an item only, so an item's input
    length stays with its rows.
    """

    def __init__(self, schedule: Schedule, input_lengths: Tensor, rows: int) -> None:
        if rows % len(input_lengths):
            raise ConfigError(
                f"{len(input_lengths)} input lengths do not fit a batch of {rows} rows: give one length per input."
            )
        self._schedule = schedule
        self._lengths = input_lengths.repeat_interleave(rows // len(input_lengths))[:, None]
        self.rows = rows
        self._table = torch.empty(rows, 0)
        self._logs = torch.empty(2, rows, 0, 1)
        self._largest: list[float] = []

    def until(self, step: int) -> None:
        """Compute the weights of the steps up to `step`."""
        while step >= len(self._largest):
            start = len(self._largest)
            steps = torch.arange(start, start + BLOCK, device=self._lengths.device)[None]
            block = self._schedule.weights(steps, self._lengths).float().expand(self.rows, BLOCK)
            if not bool(((block >= 0) & (block <= 1)).all()):
                raise ConfigError(
                    f"{type(self._schedule).__name__} returns weights outside [0, 1]: fix its `weights` method."
                )
            self._table = torch.cat((self._table.to(block.device), block), dim=1)
            logs = log_weights(block).movedim(-1, 0)[..., None]
            self._logs = torch.cat((self._logs.to(block.device), logs), dim=2)
            self._largest += block.amax(dim=0).tolist()

    def none(self, first: int, last: int) -> bool:
        """Return whether the adapter's weight is 0 in all rows at the steps first .. last."""
        return not any(self._largest[first : last + 1])

    def table(self, first: int, last: int) -> Tensor:
        """Return (rows, k), lambda at the k steps first .. last."""
        return self._table[:, first : last + 1]

    def logs(self, first: int, last: int) -> tuple[Tensor, Tensor]:
        """Return log(1 - lambda) and log(lambda), each (rows, k, 1), of the k steps first .. last."""
        log_rest, log_weight = self._logs[:, :, first : last + 1].unbind(0)
        return log_rest, log_weight
