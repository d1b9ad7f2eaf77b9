"""The tokens that a memory's contexts consist of: the prompt of each example, and the text after it."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pema.devices import is_asynchronous, move
from pema.memory.shard import Integers, ShardFile

BLANK = -1
"""In place of a token where there is none."""


@dataclass(frozen=True)
class ContextTokens:
    """The tokens of b contexts.

    Attributes:
        prompt: (b, S) int64, the tokens of each prompt, then `BLANK`.
        spellings: (b, S) int64, the token that writes `spans` tokens of the prompt after a space; see
            `pema.tasks.spelling`. `BLANK` if there is none.
        spans: (b, S) int64.
        written: (b, W) int64, `BLANK`, then the tokens that follow the prompt; the last column holds the last token.
        ids: (u,) int64, the distinct tokens of prompts and spellings, sorted; None: not determined yet.
    """

    prompt: Tensor
    spellings: Tensor
    spans: Tensor
    written: Tensor
    ids: Tensor | None = None

    def to(self, device: torch.device) -> ContextTokens:
        """Return the same tokens on a device; one that would be waited for later has the distinct tokens at once."""
        ids = self.ids
        if ids is None and is_asynchronous(device) and not is_asynchronous(self.prompt.device):
            found = np.unique(torch.cat((self.prompt, self.spellings)).numpy())
            ids = torch.from_numpy(found[found != BLANK])
        prompt, spellings, spans, written = (
            move(each, device) for each in (self.prompt, self.spellings, self.spans, self.written)
        )
        return ContextTokens(prompt, spellings, spans, written, None if ids is None else move(ids, device))


class Prompts:
    """The tokens of all contexts of a memory, in RAM: 9 bytes per token of a prompt and 4 per pair.

    Attributes:
        frame: number of tokens with which all prompts begin, and with which they end: those of the template.
    """

    def __init__(self, shards: list[ShardFile]) -> None:
        """Read them from the shards, which all have them.

        Raises:
            ExternalMemoryError: a shard is damaged.
        """
        parts = [shard.prompts() for shard in shards]
        self._tokens, self._spellings, self._spans = (
            torch.from_numpy(np.concatenate([getattr(part, name) for part in parts]))
            for name in ("tokens", "spellings", "spans")
        )
        written = [
            shard.targets(0, shard.entry.pairs).astype(np.int32) if part.written is None else part.written
            for shard, part in zip(shards, parts, strict=True)
        ]
        self._written = torch.from_numpy(np.concatenate(written))
        self._starts = _joined([part.offsets for part in parts])
        self._rows = _joined([shard.example_offsets for shard in shards])
        self.frame = self._frame()

    def at(self, rows: Tensor, frame: tuple[int, int]) -> ContextTokens:
        """Return the tokens of the contexts of some pairs.

        Args:
            rows: (b,) int64, places of the pairs in the memory.
            frame: number of tokens that are left out at the start and at the end of each prompt.
        """
        examples = torch.searchsorted(self._rows, rows.contiguous(), right=True) - 1
        starts = self._starts[examples] + frame[0]
        lengths = (self._starts[examples + 1] - frame[1] - starts).clamp(min=0)
        columns = torch.arange(max(int(lengths.max()), 1))
        exists = columns < lengths[:, None]
        places = (starts[:, None] + columns).clamp(max=len(self._tokens) - 1)
        prompt = self._tokens[places].long().masked_fill(~exists, BLANK)
        spans = self._spans[places].long()
        spans = spans.masked_fill(columns + spans > lengths[:, None], 0)  # those that write a part of the template
        spellings = self._spellings[places].long().masked_fill(spans == 0, BLANK)
        steps = rows - self._rows[examples]
        back = torch.arange(-int(steps.max()), 0)
        before = (rows[:, None] + back).clamp(min=0)
        written = self._written[before].long().masked_fill(-back > steps[:, None], BLANK)
        return ContextTokens(prompt, spellings, spans, written)

    def numbers(self) -> Integers:
        """Return (examples,) int64, equal for examples with equal prompts, and only for these."""
        tokens, starts, known = self._tokens.numpy(), self._starts.tolist(), dict[bytes, int]()
        prompts = (tokens[start:stop].tobytes() for start, stop in itertools.pairwise(starts))
        return np.array([known.setdefault(prompt, len(known)) for prompt in prompts], np.int64)

    def _frame(self) -> tuple[int, int]:
        starts, stops = self._starts[:-1], self._starts[1:]
        shortest = int((stops - starts).min())

        def common(at: Tensor, step: int) -> int:
            places = (at + step * k for k in range(shortest))
            return next(
                (k for k, place in enumerate(places) if bool((self._tokens[place] != self._tokens[place[0]]).any())),
                shortest,
            )

        first = common(starts, 1)
        return first, min(common(stops - 1, -1), shortest - first)


def _joined(offsets: list[Integers]) -> Tensor:
    """Return the offsets of consecutive shards as offsets of the whole."""
    firsts = np.cumsum([0, *(part[-1] for part in offsets)])
    moved = [part[:-1] + first for part, first in zip(offsets, firsts[:-1], strict=True)]
    return torch.from_numpy(np.concatenate([*moved, firsts[-1:]]).astype(np.int64))
