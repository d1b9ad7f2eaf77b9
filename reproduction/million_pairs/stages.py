"""The stages of `million_pairs`, each with its floor: what the least work of that stage takes on the spot."""

from __future__ import annotations

import hashlib
import itertools
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from pema.adapter.config import CORE, SAMPLE
from pema.adapter.joint import MEASURED, JointRun
from pema.adapter.likelihood import log_p_pema
from pema.adapter.module import Adapter
from pema.adapter.presets import preset
from pema.adapter.reconstruction import STRIPES, closed_form
from pema.adapter.training import train
from pema.devices import has_bfloat16
from pema.memory.build import build_memory
from pema.memory.reader import Memory
from pema.memory.sample import sample
from pema.memory.verify import verify
from pema.owner.contract import BATCH_TOKENS
from pema.owner.local import LocalPLM
from pema.tasks.readers import read_examples
from reproduction.benchmarks.joint_training import Loop, Products
from reproduction.benchmarks.timing import Run, alternate, significant
from reproduction.million_pairs.options import Setting, Stage
from reproduction.million_pairs.projection import project
from reproduction.million_pairs.source import PLM, TASK, TEXTS

CHUNK = 1 << 28
"""Bytes written, hashed or read to measure a rate."""


def processor(run: Callable[[], object]) -> float:
    """Return the processor's seconds of one call, the lesser of two: other programs disturb them less than a clock."""
    times = []
    for _ in range(2):
        started = time.process_time()
        run()
        times.append(time.process_time() - started)
    return min(times)


def build(setting: Setting, stage: Stage, folder: Path) -> tuple[dict[str, Any], Callable[[], float]]:
    """Build the memory; the floor is the bare forward pass of the same tokens, and writing the bytes once."""
    plm = LocalPLM.load(folder / PLM)
    examples = read_examples(folder / TEXTS)
    memory = build_memory(plm, examples, TASK, folder / stage.memory, dtype=stage.memory)
    tokens = len(memory.prompts._tokens) + memory.pairs
    width = tokens // memory.examples - 1

    def floor() -> float:
        rows = torch.randint(6, setting.V, (BATCH_TOKENS // width, width))

        @torch.no_grad()
        def forward() -> None:
            plm.model.model(input_ids=rows, use_cache=False)

        forward()
        data = os.urandom(CHUNK)
        place = folder / "written"
        writing = processor(lambda: place.write_bytes(data)) * memory.bytes / CHUNK
        place.unlink()
        return processor(forward) * memory.examples / len(rows) + writing

    return {"pairs": memory.pairs, "bytes": memory.bytes, "tokens": tokens}, floor


def check(_setting: Setting, stage: Stage, folder: Path) -> tuple[dict[str, Any], Callable[[], float]]:
    """Verify the memory; the floor is the SHA-256 of as many bytes in RAM."""
    report = verify(folder / stage.memory)
    data = bytes(CHUNK)
    return {
        "pairs": report.pairs,
        "bytes": report.bytes,
    }, lambda: processor(lambda: hashlib.sha256(data).digest()) * report.bytes / CHUNK


def reconstruct(_setting: Setting, stage: Stage, folder: Path) -> tuple[dict[str, Any], Callable[[], float]]:
    """Reconstruct in closed form; the floor is the products of the second moment and one eigendecomposition."""
    memory = Memory.open(folder / stage.memory)
    config = preset("paper").fitted(memory.d)
    _, _, error = closed_form(memory.view(), config.rank, memory.d)

    def floor() -> float:
        f = next(memory.view().batches(2048)).representations
        moment = f.T.double() @ f.double()
        width = -(-memory.d // STRIPES)

        def products() -> None:
            for i in range(0, memory.d, width):
                f[:, i : i + width].T @ f[:, i:]

        def decompose() -> None:
            torch.linalg.eigh(moment)

        return processor(products) * memory.pairs / len(f) + processor(decompose)

    return {"pairs": memory.pairs, "rank": config.rank, "error": significant(error)}, floor


def learn(setting: Setting, stage: Stage, folder: Path) -> tuple[dict[str, Any], Callable[[], float]]:
    """Train an adapter; the floor is the bare products of its steps."""
    memory = limited(folder / stage.memory, stage.limit)
    changes: dict[str, Any] = {"vocabulary": stage.vocabulary} if stage.vocabulary else {}
    changes |= {"learning_rate": setting.learning_rate} if setting.learning_rate else {}
    out, spent = folder / "adapter", 0.0
    shutil.rmtree(out, ignore_errors=True)
    epoch = JointRun.epoch

    def timed(run: JointRun, advance: Any) -> None:  # noqa: ANN401
        nonlocal spent
        started = time.process_time()
        epoch(run, advance)
        spent += time.process_time() - started

    with patch.object(JointRun, "epoch", timed):
        adapter, figures = train(memory, preset(stage.preset, epochs=setting.epochs, **changes), out)
    settings, seen = adapter.config.training["settings"], len(memory.view().targets_seen())
    rows = {"seen": seen, "sampled": min(seen, CORE) + SAMPLE}.get(settings["vocabulary"], setting.V)
    pairs = int(figures["epochs"] * figures["pairs"])
    result = {
        "pairs": pairs,
        "held_out_pairs": figures["held_out_pairs"],
        "seen": seen,
        "rows": rows,
        "vocabulary": settings["vocabulary"],
        "batch_size": settings["batch_size"],
        "epoch_processor_seconds": significant(spent),
        "start_cross_entropy": figures["start_cross_entropy"],
        "held_out_cross_entropy": figures["held_out_cross_entropy"],
    }
    if stage.memory != "float16":
        result["cross_entropy_of_float16"] = loss_of(adapter, limited(folder / "float16", stage.limit))

    def floor() -> float:
        size = settings["batch_size"]
        dtype = torch.bfloat16 if has_bfloat16(torch.device("cpu")) else torch.float32
        f = torch.cat([batch.representations for batch in itertools.islice(memory.view().batches(size), 4)])
        products = Products(f, memory.head().weight[:rows].float(), settings["rank"], size, dtype)
        products.a_pass()
        return processor(products.a_pass) * pairs / len(f)

    return result, floor


def steps(setting: Setting, stage: Stage, folder: Path) -> tuple[dict[str, Any], Callable[[], float]]:
    """Run the steps of an epoch in turns with their bare products; the least of each is taken."""
    memory = limited(folder / stage.memory, stage.limit)
    seen = len(memory.view().targets_seen())
    changes = {"vocabulary": stage.vocabulary} if stage.vocabulary else {}
    config = preset(stage.preset, least_steps=0, copy_width=0, **changes).with_vocabulary(setting.V, seen)
    loop = Loop(memory, config, folder / "steps")
    rows = {"seen": seen, "sampled": min(seen, CORE) + SAMPLE}.get(loop.config.vocabulary, setting.V)
    f = torch.cat([batch.representations for batch in memory.view().batches(config.batch_size)])
    W_hd = memory.head().weight[:rows].float()
    dtype = torch.bfloat16 if has_bfloat16(torch.device("cpu")) else torch.float32
    products = Products(f, W_hd, loop.config.rank, config.batch_size, dtype)
    del f, W_hd
    runs: dict[str, Run] = {"steps": loop.a_pass, "products": products.a_pass}
    least = {name: min(times) for name, times in alternate(runs, 2, clock="processor").items()}
    loop.run.log.close()
    result = {
        "pairs": memory.pairs,
        "seen": seen,
        "rows": rows,
        "vocabulary": loop.config.vocabulary,
        "batch_size": config.batch_size,
        "epoch_processor_seconds": significant(least["steps"]),
    }
    return result, lambda: least["products"]


def loss_of(adapter: Adapter, memory: Memory) -> float:
    """Return the cross-entropy of an adapter on the held-out pairs of a memory, as `train` measures it."""
    settings = adapter.config.training["settings"]
    _, held_out = memory.split(settings["dev_fraction"], settings["seed"])
    head, total, pairs = memory.head(), 0.0, 0
    for batch in held_out.spread(MEASURED).batches(512):
        total -= float(log_p_pema(adapter, head, batch.representations, batch.targets).sum())
        pairs += len(batch.targets)
    return total / pairs


def limited(path: Path, pairs: int) -> Memory:
    """Return a memory, or a sample of it with at most `pairs` pairs; 0: all."""
    if not pairs:
        return Memory.open(path)
    smaller = path.with_name(f"{path.name}-{pairs}")
    return Memory.open(smaller) if smaller.exists() else sample(path, smaller, pairs)


def coordinates(_setting: Setting, stage: Stage, folder: Path) -> tuple[dict[str, Any], Callable[[], float]]:
    """Write the float16 memory again with representations of k principal coordinates."""
    memory = Memory.open(folder / "float16")
    made = project(memory, int(stage.memory), folder / stage.memory)
    return {"pairs": made.pairs, "bytes": made.bytes * int(stage.memory) // made.d}, lambda: 0.0


KINDS = {
    "build": build,
    "verify": check,
    "reconstruct": reconstruct,
    "train": learn,
    "steps": steps,
    "project": coordinates,
}
"""Kinds of stages. Each is run, and returns its figures, and a function that measures its floor."""
