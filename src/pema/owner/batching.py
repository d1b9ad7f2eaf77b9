"""Batching of contexts: common prefixes, batches of similar length that fit the device, padding."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from pema.console import note
from pema.devices import lacks_memory
from pema.errors import CapacityError

Result = TypeVar("Result")


def common_prefix(sequences: Sequence[Sequence[int]], at_most: int) -> int:
    """Return the length of the common prefix of all sequences, at most `at_most` tokens."""
    if not sequences or at_most <= 0:
        return 0
    # The common prefix of the lexicographic minimum and maximum is common to all sequences.
    heads = [tuple(sequence[:at_most]) for sequence in sequences]
    least, greatest = min(heads), max(heads)
    for i, (a, b) in enumerate(zip(least, greatest, strict=False)):
        if a != b:
            return i
    return min(len(least), len(greatest))


def length_batches(lengths: Sequence[int], tokens: int) -> Iterator[list[int]]:
    """Yield batches of indices of similar length, the longest first; rows times longest is at most `tokens`.

    A sequence longer than `tokens` forms a batch by itself.
    """
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    start = 0
    while start < len(order):
        rows = max(1, tokens // max(1, lengths[order[start]]))
        yield order[start : start + rows]
        start += rows


class Fitting:
    """Batches of contexts, halved where a device lacks the memory for them; a larger one is not tried again."""

    def __init__(self) -> None:
        self._most: int | None = None

    def run(
        self, batch: list[int], lengths: Sequence[int], compute: Callable[[list[int]], Result]
    ) -> Iterator[tuple[list[int], Result]]:
        """Yield the parts of a batch with their results: usually the batch itself.

        Args:
            batch: indices of contexts.
            lengths: length of each context.
            compute: computes a part.

        Raises:
            CapacityError: there is no memory even for one context.
        """
        parts = [batch]
        while parts:
            part = parts.pop()
            tokens = len(part) * max(lengths[i] for i in part)
            if len(part) == 1 or self._most is None or tokens <= self._most:
                result = self._computed(part, tokens, compute)
                if result is not None:
                    yield part, result
                    continue
            middle = -(-len(part) // 2)
            parts += [part[middle:], part[:middle]]

    def _computed(self, part: list[int], tokens: int, compute: Callable[[list[int]], Result]) -> Result | None:
        """Return the result; None if there is no memory for it."""
        try:
            return compute(part)
        except (MemoryError, RuntimeError) as error:
            if not lacks_memory(error):
                raise
            if len(part) == 1:
                raise CapacityError(
                    f"the PLM's device has no memory for a context of {tokens} tokens. Use shorter examples, a smaller "
                    f"--dtype of the PLM, or --device-map auto on several devices. ({error})"
                ) from error
        # Outside of the handler, because the error holds the tensors of the attempt.
        note(f"the PLM's device has no memory for a batch of {tokens:,} tokens: batches are halved (--batch-tokens).")
        self._most = tokens // 2
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return None


def pad_right(sequences: Sequence[Sequence[int]]) -> Tensor:
    """Pad sequences on the right, (rows, longest) int64, with each row's last token; causal attention ignores it."""
    width = max(len(sequence) for sequence in sequences)
    return torch.tensor([[*sequence, *[sequence[-1]] * (width - len(sequence))] for sequence in sequences])


def pad_left(sequences: Sequence[Sequence[int]], width: int) -> tuple[Tensor, Tensor]:
    """Pad sequences on the left: (rows, width) int64 tokens and attention mask; a row's first token is the filler."""
    tokens = torch.tensor([[*[sequence[0]] * (width - len(sequence)), *sequence] for sequence in sequences])
    gaps = torch.tensor([width - len(sequence) for sequence in sequences])
    return tokens, (torch.arange(width) >= gaps[:, None]).long()
