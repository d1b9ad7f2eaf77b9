"""Which contexts go through the model together, and what they share."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor


def common_prefix(sequences: Sequence[Sequence[int]], at_most: int) -> int:
    """How many tokens all of the sequences begin with, at most `at_most`."""
    if not sequences or at_most <= 0:
        return 0
    # What the least and the greatest in lexicographic order share, all that lie between them share.
    heads = [tuple(sequence[:at_most]) for sequence in sequences]
    least, greatest = min(heads), max(heads)
    for i, (a, b) in enumerate(zip(least, greatest, strict=False)):
        if a != b:
            return i
    return min(len(least), len(greatest))


def length_batches(lengths: Sequence[int], tokens: int) -> Iterator[list[int]]:
    """Indices in batches of nearly equal length, the longest first; rows times longest is at most `tokens`.

    A sequence longer than `tokens` is a batch of its own.
    """
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    start = 0
    while start < len(order):
        rows = max(1, tokens // max(1, lengths[order[start]]))
        yield order[start : start + rows]
        start += rows


def pad_right(sequences: Sequence[Sequence[int]]) -> Tensor:
    """(rows, longest) int64; each row is filled up with its own last token, which no causal position looks ahead to."""
    width = max(len(sequence) for sequence in sequences)
    return torch.tensor([[*sequence, *[sequence[-1]] * (width - len(sequence))] for sequence in sequences])


def pad_left(sequences: Sequence[Sequence[int]], width: int) -> tuple[Tensor, Tensor]:
    """(rows, width) int64 tokens and their attention mask; a row's own first token fills the front."""
    tokens = torch.tensor([[*[sequence[0]] * (width - len(sequence)), *sequence] for sequence in sequences])
    gaps = torch.tensor([width - len(sequence) for sequence in sequences])
    return tokens, (torch.arange(width) >= gaps[:, None]).long()
