"""One stage of `reproduction.experiments.scaling`, in a process that it, a launcher or nobody else has started.

    python -m reproduction.experiments.scaled STAGE OUTPUT BEFORE RESULT STARTED

STAGE is the stage in JSON, OUTPUT the folder of what it makes, BEFORE that of the stage before, RESULT the file of the
times, STARTED the time on the clock when the command was given.
"""

from __future__ import annotations

import hashlib
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import pema
from pema.cluster.config import EngineConfig
from pema.cluster.opening import opened
from pema.cluster.replicas import Replicas
from pema.experiments.data import restaurant_data
from pema.files import write_json
from pema.memory.encoding import Tokens
from pema.processes import join
from reproduction.tables.scaling import RAY

SHARD, BATCH, NEW_TOKENS = 16, 16, 48
"""Examples of a shard, texts of a batch, and maximum number of tokens of a text: several units for each worker."""

Clock = Callable[[], None]
"""Called when everything is loaded."""


@dataclass(frozen=True)
class Stage:
    """What is measured: `build`, `train` or `generate`, by what, and of what size."""

    name: str
    engine: str
    workers: int
    plm: str
    examples: int
    texts: int
    epochs: int

    @property
    def run(self) -> str:
        """Name of the result."""
        return f"{self.name} {self.engine} {self.workers}"

    @property
    def where(self) -> EngineConfig:
        """Where the PLM runs."""
        return EngineConfig("ray", self.workers) if self.engine == RAY else EngineConfig()


def build(stage: Stage, before: Path, output: Path, ready: Clock) -> dict[str, Any]:
    """Build a memory."""
    task, examples = pema.get_task("data-to-text"), restaurant_data().train[: stage.examples]
    with opened(stage.plm, stage.where) as plm:
        _settle(plm)
        ready()
        memory = pema.build_memory(plm, examples, task, output, examples_per_shard=SHARD)
        ended = time.time()
        tokens = Tokens.encode(plm, task.template.settled(plm.tokenizer), examples, apart=False)
    count = sum(len(tokens.sequence(i)) - 1 for i in range(len(examples)))
    return {"ended": ended, "count": count, "digest": memory.manifest.to_dict()["digest"]}


def train(stage: Stage, before: Path, output: Path, ready: Clock) -> dict[str, Any]:
    """Train an adapter on the memory of the one process."""
    memory = pema.Memory.open(before)
    ready()
    pema.train(memory, pema.preset("best", epochs=stage.epochs, patience=stage.epochs), output)
    return {"ended": time.time(), "count": memory.pairs * stage.epochs}


def generate(stage: Stage, before: Path, output: Path, ready: Clock) -> dict[str, Any]:
    """Generate texts with the adapter of the one process."""
    adapter = pema.Adapter.from_pretrained(before)
    sources = [example.source for example in restaurant_data().test[: stage.texts]]
    with opened(stage.plm, stage.where) as plm:
        _settle(plm)
        ready()
        texts = pema.generate(plm, adapter, sources, batch_size=BATCH, max_new_tokens=NEW_TOKENS)
        ended = time.time()
    return {"ended": ended, "count": len(texts), "digest": hashlib.sha256(json.dumps(texts).encode()).hexdigest()}


MEASURED = {each.__name__: each for each in (build, train, generate)}


def _settle(plm: object) -> None:
    if isinstance(plm, Replicas):
        plm.wait_for_all()


def main() -> None:
    """Run the stage; the process that writes also writes the times."""
    stage, (output, before, result) = Stage(**json.loads(sys.argv[1])), map(Path, sys.argv[2:5])
    processes, loaded = join(), [0.0]

    def ready() -> None:
        processes.add(torch.zeros(1))  # returns when all processes have come here
        loaded[0] = time.time()

    measured = MEASURED[stage.name](stage, before, output, ready)
    if processes.is_writer:
        times = {"start": loaded[0] - float(sys.argv[5]), "work": measured.pop("ended") - loaded[0]}
        write_json(result, times | measured)


if __name__ == "__main__":
    main()
