"""Run one setting on one task's data: build, train, generate, evaluate. What another setting left behind is used."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from pema.adapter.config import preset as preset_of
from pema.adapter.module import Adapter
from pema.adapter.training import train
from pema.evaluation.evaluate import evaluate
from pema.evaluation.outputs import write_hypotheses
from pema.experiments.data import Data
from pema.experiments.setting import Setting
from pema.files import read_json, write_json
from pema.generation.decoding import generate
from pema.generation.fitted import store_fitted
from pema.generation.schedule import NoAdapter, Schedule, choose_schedule
from pema.memory.build import build_memory
from pema.memory.reader import Memory
from pema.owner.contract import PLM
from pema.signature import signature
from pema.tasks.registry import get_task


def adapt(plm: PLM, data: Data, setting: Setting, folder: Path, *, part: str = "test") -> dict[str, Any]:
    """Run `setting` and score it on `part` ("dev" or "test") of the data.

    Memories, adapters and results are kept below `folder` and taken from there when they are finished.

    Returns:
        JSON-ready: the scores by name (`bleu`, `chrf`, and `formality_accuracy` where the data are annotated), memory
        bytes and pairs, build, training and generation seconds, and the signature. Hypotheses lie beside the result,
        one a line.
    """
    result_file = folder / "results" / f"{setting.key}.{part}.json"
    if result_file.exists():
        return read_json(result_file)
    task = get_task(data.task)
    result: dict[str, Any] = {"data": data.name, "part": part, "memory_bytes": 0, "train_seconds": 0.0}
    adapter: Adapter | None = None
    schedule: Schedule = NoAdapter()
    if setting.preset is not None:
        memory, built = memory_of(plm, data, setting, folder)
        adapter, trained = adapter_of(memory, setting, folder)
        schedule = choose_schedule(folder / "adapters" / setting.adapter_key, setting.schedule, setting.lambda_max)
        result |= {"memory_bytes": memory.bytes, "pairs": memory.pairs} | built | trained
    examples = data.test if part == "test" else data.dev
    started = time.perf_counter()
    hypotheses = generate(plm, adapter, [e.source for e in examples], task, schedule)
    result["generate_seconds"] = round(time.perf_counter() - started, 2)
    scores = evaluate(task, hypotheses, [e.target for e in examples], annotated=data.annotated.get(part))
    result |= {name: round(score.value, 4) for name, score in scores.items()}
    result["metrics"] = {name: score.signature for name, score in scores.items()}
    config = setting.to_dict() | {"plm": plm.description.to_dict(), "data": data.name, "data_sha256": data.digest()}
    result["signature"] = signature(config, setting.seed)
    write_hypotheses(result_file.with_suffix(".txt"), hypotheses)
    write_json(result_file, result)
    return result


def memory_of(plm: PLM, data: Data, setting: Setting, folder: Path) -> tuple[Memory, dict[str, float]]:
    """The memory that `setting` needs, and the seconds that building it took."""
    path = folder / "memories" / setting.memory_key
    seconds = path.with_name(path.name + ".json")
    if not seconds.exists():
        started = time.perf_counter()
        build_memory(
            plm,
            list(data.train),
            get_task(data.task),
            path,
            contexts=setting.contexts,
            targets=setting.targets,
            dtype=setting.dtype,
        )
        write_json(seconds, {"build_seconds": round(time.perf_counter() - started, 2)})
    return Memory.open(path), read_json(seconds)


def adapter_of(memory: Memory, setting: Setting, folder: Path) -> tuple[Adapter, dict[str, Any]]:
    """The adapter that `setting` needs, and what its training reported."""
    path = folder / "adapters" / setting.adapter_key
    summary = path.with_name(path.name + ".json")
    if not summary.exists():
        config = preset_of(setting.preset or "best", seed=setting.seed, **setting.changes)
        started = time.perf_counter()
        adapter, trained = train(memory, config, path, resume=path.exists())
        # A run that was resumed took longer than this call: what its log adds up to.
        seconds = round(max(time.perf_counter() - started, trained["train_seconds"]), 2)
        store_fitted(adapter, memory, config, path)
        write_json(summary, {**trained, "train_seconds": seconds})
    return Adapter.from_pretrained(path), read_json(summary)
