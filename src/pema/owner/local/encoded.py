"""Growing contexts for any model, each run with the position encoding that it has without a batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from pema.owner.local.growing import CachedContexts, GrowingContexts, WholeContexts
from pema.owner.local.prefix import Prefix
from pema.owner.local.running import Runner
from pema.owner.positions import PositionEncoding


def cached(
    runner: Runner, rows: Sequence[Sequence[int]], prefix: Prefix | None = None, *, padding: bool = True
) -> GrowingContexts:
    """Create contexts whose state (keys and values, or another) is cached while their position encoding is unchanged.

    Args:
        runner: runs the model.
        rows: the contexts.
        prefix: the cache of their common prefix.
        padding: whether rows of different lengths may be padded on the left.
    """

    def begin(rows: Sequence[Sequence[int]]) -> GrowingContexts:
        of = runner.positions.of
        return CachedContexts(runner, rows, prefix if prefix and of(prefix.length) == of(len(rows[0])) else None)

    if padding and not runner.positions.varies:
        return begin(rows)
    return GroupedContexts(begin, runner.positions, rows, padding=padding)


def whole(runner: Runner, rows: Sequence[Sequence[int]], *, together: bool) -> GrowingContexts:
    """Create contexts that are run from their first token at every step.

    Args:
        runner: runs the model.
        rows: the contexts.
        together: whether rows of different lengths may share a forward pass.
    """

    def begin(rows: Sequence[Sequence[int]]) -> GrowingContexts:
        return WholeContexts(runner, rows, together=together)

    return GroupedContexts(begin, runner.positions, rows) if runner.positions.varies else begin(rows)


class GroupedContexts:
    """Contexts in groups that may share a forward pass: those of one position encoding, or of one length.

    A row whose encoding changes as it grows leaves its group and is run again from its first token, because its cached
    keys were rotated by other angles.
    """

    def __init__(
        self,
        begin: Callable[[Sequence[Sequence[int]]], GrowingContexts],
        positions: PositionEncoding,
        rows: Sequence[Sequence[int]],
        *,
        padding: bool = True,
    ) -> None:
        self._begin, self._positions, self._padding = begin, positions, padding
        self._contexts = [list(row) for row in rows]
        self._parts = self._begun(range(len(rows)))

    def run(self, *, logits: bool) -> tuple[Tensor, Tensor]:
        """Run the new tokens; see `GrowingContexts.run`."""
        ran = [part.run(logits=logits) for part, _ in self._parts]
        order = torch.tensor([row for _, members in self._parts for row in members]).argsort()
        f, words = (torch.cat(tensors) for tensors in zip(*ran, strict=True))
        return f[order.to(f.device)], words[order.to(words.device)]

    def extend(self, tokens: Tensor, parents: Tensor | None) -> None:
        """Extend the rows; see `GrowingContexts.extend`."""
        rows = list(range(len(self._contexts))) if parents is None else parents.tolist()
        before = [self._positions.of(len(context)) for context in self._contexts]
        self._contexts = [[*self._contexts[row], token] for row, token in zip(rows, tokens.tolist(), strict=True)]
        stays = [self._positions.of(len(c)) == before[row] for c, row in zip(self._contexts, rows, strict=True)]
        parts = []
        for part, members in self._parts:
            places = {row: place for place, row in enumerate(members)}
            kept = [i for i, row in enumerate(rows) if row in places and stays[i]]
            if kept:
                chosen = torch.tensor([places[rows[i]] for i in kept], device=tokens.device)
                same = chosen.tolist() == list(range(len(members)))
                part.extend(tokens[torch.tensor(kept, device=tokens.device)], None if same else chosen)
                parts.append((part, kept))
        self._parts = parts + self._begun([i for i, stay in enumerate(stays) if not stay])

    @property
    def held_bytes(self) -> int:
        """Bytes held by the parts, and by the tokens."""
        return sum(part.held_bytes for part, _ in self._parts) + 8 * sum(map(len, self._contexts))

    def joinable(self) -> CachedContexts | None:
        """Return the only part, if there is exactly one with all rows in order."""
        part, members = self._parts[0]
        return part.joinable() if list(members) == list(range(len(self._contexts))) else None

    def _begun(self, rows: Sequence[int]) -> list[tuple[GrowingContexts, list[int]]]:
        """Begin a part per group of rows; rows of equal length stay equal, since each grows by one token per step."""
        members: dict[tuple[bytes, int], list[int]] = {}
        for row in rows:
            length = len(self._contexts[row])
            members.setdefault((self._positions.of(length), 0 if self._padding else length), []).append(row)
        return [(self._begin([self._contexts[row] for row in group]), group) for group in members.values()]
