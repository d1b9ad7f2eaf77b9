"""On-policy rounds: memories of the contexts that the adapter of the round before reaches, and an adapter of them all.

Round 0 builds a memory of `predicted` contexts, whose text the PLM writes, or of `teacher` contexts. Each further round
trains an adapter on the memory, lets it write the texts for all examples (`pema.generation.on_policy`), and appends the
contexts that it reaches, paired with the targets by alignment (after `teacher` contexts: `aligned`). A round sends no
target to the PLM's owner.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pema import console
from pema.adapter import store
from pema.adapter.module import Adapter
from pema.adapter.training import train
from pema.errors import MismatchError
from pema.generation.on_policy import OnPolicy
from pema.memory import places
from pema.memory.build import build_memory
from pema.memory.config import require_rounds
from pema.memory.manifest import FILE, Input, Manifest
from pema.memory.reader import Memory
from pema.storage.publishing import destination
from pema.tasks.example import one_target_each

if TYPE_CHECKING:
    from pema.adapter.config import TrainConfig
    from pema.memory.config import BuildConfig
    from pema.owner.contract import PLM
    from pema.tasks.example import Example
    from pema.tasks.registry import Task

MEMORY, ADAPTER = "memory", "adapter"


def adapt(
    plm: PLM,
    examples: Iterable[Example],
    task: Task,
    output: Path | str,
    training: TrainConfig,
    building: BuildConfig,
    rounds: int = 0,
) -> tuple[Adapter, dict[str, Any]]:
    """Build a memory in `output`/memory, with on-policy rounds, and train an adapter on it in `output`/adapter.

    The same call resumes one that was killed.

    Args:
        plm: the frozen language model.
        examples: the pairs of texts.
        task: the task.
        output: the folder, or its address in object storage: memory and adapters are published once all are complete.
        training: settings of the training of every round's adapter.
        building: settings of the memory.
        rounds: number of rounds after the first memory; 0: build and train once.

    Returns:
        The adapter, and the figures of its training.

    Raises:
        ConfigError: rounds of `predicted` contexts whose targets are not aligned, or with differential privacy; or
            settings of the training do not suit the PLM.
        PemaError: as `build_memory` and `train`.
    """
    adapters = [f"{ADAPTER}-{k}" for k in range(1, rounds + 1)] + [ADAPTER]
    with destination(output, {MEMORY: places.MEMORY, **dict.fromkeys(adapters, store.ADAPTER)}) as folder:
        memory = build_in_rounds(plm, examples, task, folder, training, building, rounds)
        return train(memory, training, folder / ADAPTER, resume=True)


def build_in_rounds(
    plm: PLM,
    examples: Iterable[Example],
    task: Task,
    output: Path,
    training: TrainConfig,
    building: BuildConfig,
    rounds: int,
) -> Memory:
    """Build the memory of `adapt`; the adapter that writes the text of round k is in `output`/adapter-k."""
    require_rounds(rounds, building, training.dp_epsilon)
    training.require_suited(plm.description)
    examples = list(one_target_each(examples))[: building.limit]
    started = _started(output / MEMORY, examples, building, rounds)
    if started <= 1:
        build_memory(plm, examples, task, output / MEMORY, building)
    for k in range(max(1, started - 1), rounds + 1):
        folder = output / f"{ADAPTER}-{k}"
        console.note(f"Round {k} of {rounds}: the texts of an adapter.")
        adapter = (
            Adapter.from_pretrained(folder)
            if k < started
            else train(Memory.open(output / MEMORY), training, folder, resume=True)[0]
        )
        build_memory(OnPolicy(plm, adapter), examples, task, output / MEMORY, building, append=True)
    return Memory.open(output / MEMORY)


def _started(folder: Path, examples: list[Example], building: BuildConfig, rounds: int) -> int:
    """Return the number of inputs of the memory that an earlier call left in `folder`.

    Raises:
        MismatchError: it has other examples, or more rounds.
    """
    if not (folder / FILE).exists():
        return 0
    inputs = Manifest.read(folder).inputs
    if len(inputs) > 1 and inputs[0] != Input.of(examples, building.examples_per_shard):
        raise MismatchError(
            f"{folder} was built from another input ({inputs[0].examples:,} examples, digest {inputs[0].sha256[:12]}): "
            "use the same examples, or choose another folder."
        )
    if len(inputs) > rounds + 1:
        raise MismatchError(
            f"{folder} has {len(inputs) - 1} rounds, more than rounds={rounds}: give that number, or another folder."
        )
    return len(inputs)
