"""Batching of contexts: common prefixes, batches of similar length, padding."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor


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


def pad_right(sequences: Sequence[Sequence[int]]) -> Tensor:
    """Pad sequences on the right, (rows, longest) int64, with each row's last token; causal attention ignores it."""
    width = max(len(sequence) for sequence in sequences)
    return torch.tensor([[*sequence, *[sequence[-1]] * (width - len(sequence))] for sequence in sequences])


def pad_left(sequences: Sequence[Sequence[int]], width: int) -> tuple[Tensor, Tensor]:
    """Pad sequences on the left: (rows, width) int64 tokens and attention mask; a row's first token is the filler."""
    tokens = torch.tensor([[*[sequence[0]] * (width - len(sequence)), *sequence] for sequence in sequences])
    gaps = torch.tensor([width - len(sequence) for sequence in sequences])
    return tokens, (torch.arange(width) >= gaps[:, None]).long()
