"""The held-out split: one function, so that every method of a comparison holds out the same examples."""

from __future__ import annotations

import numpy as np

from pema.errors import ConfigError
from pema.schema import SEED, require

Numbers = np.ndarray[tuple[int], np.dtype[np.int64]]


def draw_held_out(examples: int, dev_fraction: float, seed: int, holder: str) -> tuple[Numbers, Numbers]:
    """Split examples at random into a training set and a held-out set.

    Args:
        examples: number of examples.
        dev_fraction: fraction of examples to hold out; at least one is held out and at least one is not.
        seed: the same seed draws the same examples.
        holder: name of what contains the examples, for the message.

    Returns:
        The indices of the training examples and of the held-out examples, both in ascending order.

    Raises:
        ConfigError: the fraction is not between 0 and 1, or there is only one example.
    """
    require("dev_fraction", dev_fraction, float, above=0.0, below=1.0)
    require("seed", seed, int, least=0, most=SEED)
    if examples < 2:
        raise ConfigError(f"{holder} contains {examples} example: a split needs at least two.")
    held_out = min(max(round(examples * dev_fraction), 1), examples - 1)
    order = np.random.default_rng(seed).permutation(examples)
    return np.sort(order[held_out:]), np.sort(order[:held_out])
