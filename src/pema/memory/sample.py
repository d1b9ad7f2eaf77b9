"""Sampling of smaller memories."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from pema import console
from pema.errors import ConfigError
from pema.files import writing
from pema.memory.manifest import Input, refuse_existing
from pema.memory.merge import copy_head
from pema.memory.places import MEMORY
from pema.memory.reader import Memory
from pema.memory.shard import Contents, Integers, ShardFile, write_shard
from pema.schema import SEED, require
from pema.storage.address import shown
from pema.storage.publishing import destination


def sample(path: Path | str, output: Path | str, pairs: int, seed: int = 0) -> Memory:
    """Sample whole examples without replacement into a new memory of at most `pairs` pairs.

    Examples are tried in random order; those that no longer fit are skipped. They keep the order, the bytes and the
    shard boundaries of the original memory.

    Args:
        path: a complete memory, or its address.
        output: folder of the new memory, which must not exist; or its address.
        pairs: maximum number of pairs.
        seed: the same seed draws the same examples.

    Raises:
        ConfigError: `pairs` is too small for every example, or `output` exists.
        ExternalMemoryError: the memory is damaged or incomplete.
        StorageError: a write failed; nothing is left at `output`.
    """
    require("pairs", pairs, int, least=1)
    require("seed", seed, int, least=0, most=SEED)
    with destination(output, MEMORY, anew=True) as folder:
        _sample(path, folder, pairs, seed)
    return Memory.open(output)


def _sample(path: Path | str, output: Path, pairs: int, seed: int) -> None:
    refuse_existing(output)
    memory = Memory.open(path)
    lengths = example_lengths(memory)
    chosen = draw(lengths, pairs, seed)
    if not len(chosen):
        raise ConfigError(
            f"pairs={pairs} is less than the {lengths.min()} pairs of the shortest example in {shown(path)}."
        )
    take(memory, chosen, output, f"{pairs} {seed}")


def take(memory: Memory, chosen: Integers, output: Path, origin: str) -> Memory:
    """Copy the chosen examples into a new memory.

    Args:
        memory: the memory to copy from.
        chosen: (k,) indices of the examples, ascending; at least one.
        output: folder of the new memory; must not exist.
        origin: how they were chosen; becomes part of the digest in the new manifest.

    Raises:
        ConfigError: `output` exists.
        ExternalMemoryError: the memory is damaged.
        StorageError: a write failed; nothing is left at `output`.
    """
    refuse_existing(output)
    manifest = memory.manifest
    whole = f"{manifest.to_dict()['digest']} {origin}"
    entry = Input(
        hashlib.sha256(whole.encode()).hexdigest(),
        len(chosen),
        max(given.examples_per_shard for given in manifest.inputs),
        manifest.statistics,
        next((given.policy for given in manifest.inputs if given.policy), None),
    )
    drawn = replace(manifest, inputs=(entry,), shards=(), complete=False)
    with (
        writing(output, private=True) as folder,
        console.progress("sampling", float(example_lengths(memory)[chosen].sum()), "pairs") as advance,
    ):
        copy_head(memory, folder)
        first = 0
        for shard in memory.shards:
            selected = chosen[(chosen >= first) & (chosen < first + shard.entry.examples)] - first
            first += shard.entry.examples
            if len(selected):
                drawn = drawn.add(write_shard(folder, len(drawn.shards), select(shard, selected)))
                advance(drawn.shards[-1].pairs)
        drawn.write(folder)
    return Memory.open(output)


def example_lengths(memory: Memory) -> Integers:
    """Return the number of pairs of every example, (e,)."""
    lengths: Integers = np.concatenate([np.diff(shard.example_offsets) for shard in memory.shards])
    return lengths


def draw(lengths: Integers, pairs: int, seed: int) -> Integers:
    """Draw random examples whose `lengths` (e,) sum to at most `pairs`; the indices are ascending."""
    order = np.random.default_rng(seed).permutation(len(lengths))
    chosen = []
    remaining, shortest = pairs, int(lengths.min())
    for example in order:
        if remaining < shortest:
            break
        if lengths[example] <= remaining:
            chosen.append(example)
            remaining -= int(lengths[example])
    return np.sort(np.array(chosen, np.int64))


def select(shard: ShardFile, examples: Integers) -> Contents:
    """Return the given examples (k,) of a shard, in stored form.

    Raises:
        ExternalMemoryError: the shard is damaged.
    """
    shard.require_whole()
    whole = shard.contents()
    offsets = shard.example_offsets
    lengths = offsets[examples + 1] - offsets[examples]
    ends = np.cumsum(lengths)
    places = np.repeat(offsets[examples] - (ends - lengths), lengths) + np.arange(ends[-1])
    rows = torch.from_numpy(places)
    return Contents(
        representations=whole.representations[rows],
        scales=None if whole.scales is None else whole.scales[rows],
        channel_scales=whole.channel_scales,
        targets=whole.targets[rows],
        example_offsets=torch.from_numpy(np.concatenate([[0], ends])),
        source_lengths=whole.source_lengths[torch.from_numpy(examples)],
        on_policy=shard.entry.on_policy,
        sources=None if whole.sources is None else whole.sources[torch.from_numpy(examples)],
        prompts=None if whole.prompts is None else whole.prompts.select(examples, places),
    )
