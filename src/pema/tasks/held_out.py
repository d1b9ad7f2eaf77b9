"""The held-out split and other selections: one function each, so that every method has the same examples."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable

import numpy as np

from pema.errors import ConfigError
from pema.schema import SEED, require
from pema.tasks.example import Example

Numbers = np.ndarray[tuple[int], np.dtype[np.int64]]


def sources_of(examples: Iterable[Example]) -> Numbers | None:
    """Return a number for each example, equal if source and history are equal; None if no two examples are.

    The number is a hash of 8 bytes, so examples of different inputs can be compared.
    """
    numbers: Numbers = np.array([_number(example) for example in examples], "<u8").view("<i8").astype(np.int64)
    return numbers if len(np.unique(numbers)) < len(numbers) else None


def _number(example: Example) -> int:
    text = example.source.encode("utf-8", "surrogatepass")
    if example.history:
        turns = json.dumps([[turn.role, turn.content] for turn in example.history])
        text = turns.encode() + b"\xff" + text
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")


def draw_held_out(
    examples: int, dev_fraction: float, seed: int, holder: str, sources: Numbers | None = None
) -> tuple[Numbers, Numbers]:
    """Split examples at random into a training set and a held-out set.

    Examples of one source are never separated, so that the held-out loss is that of sources which training never saw.

    Args:
        examples: number of examples.
        dev_fraction: fraction of examples to hold out; at least one source is held out and at least one is not. The
            sources are held out whole, in random order, until this fraction is reached.
        seed: the same seed draws the same examples.
        holder: name of what contains the examples, for the message.
        sources: (examples,) equal numbers for examples of one source; None if all sources differ.

    Returns:
        The indices of the training examples and of the held-out examples, both in ascending order.

    Raises:
        ConfigError: the fraction is not between 0 and 1, or there is only one example or source.
    """
    require("dev_fraction", dev_fraction, float, above=0.0, below=1.0)
    require("seed", seed, int, least=0, most=SEED)
    if examples < 2:
        raise ConfigError(f"{holder} contains {examples} example: a split needs at least two.")
    random, wanted = np.random.default_rng(seed), max(round(examples * dev_fraction), 1)
    if sources is None:
        order, held_out = random.permutation(examples), min(wanted, examples - 1)
        return np.sort(order[held_out:]), np.sort(order[:held_out])
    _, first, group, sizes = np.unique(sources, return_index=True, return_inverse=True, return_counts=True)
    if len(first) < 2:
        raise ConfigError(f"{holder} contains {examples} examples of one source: a split needs at least two sources.")
    order = np.argsort(first)[random.permutation(len(first))]
    taken = min(int(np.searchsorted(np.cumsum(sizes[order]), wanted)) + 1, len(first) - 1)
    is_held_out = np.isin(group, order[:taken])
    return np.flatnonzero(~is_held_out), np.flatnonzero(is_held_out)


def spread(count: int, most: int) -> list[int]:
    """Return the numbers of at most `most` of `count` examples, evenly spaced over all of them."""
    chosen = min(count, most)
    return [i * count // chosen for i in range(chosen)]
