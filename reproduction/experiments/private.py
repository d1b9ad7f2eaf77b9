"""Privacy and quality on customer-support sentences: no privacy and three epsilons, each audited.

    python -m reproduction.experiments.private -o runs/private

A random half of the demo's training sentences are the members that every adapter is trained on; the other half are
the non-members of the audit. BLEU, chrF and formality accuracy are of the demo's test sentences, every adapter with the
same schedule. Results go to `reproduction/results/private.jsonl`; finished ones are skipped. The settings were chosen
on the demo's dev sentences alone (`--part dev`, which writes no results).
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from pema.adapter.config import TrainConfig
from pema.adapter.module import Adapter
from pema.adapter.presets import preset
from pema.adapter.schedule import Constant, NoAdapter, Schedule
from pema.adapter.training import train
from pema.evaluation.evaluate import evaluate
from pema.evaluation.perplexity import perplexity
from pema.experiments.data import Data, support_data
from pema.generation.decoding import generate
from pema.memory.build import build_memory
from pema.memory.reader import Memory
from pema.owner.local import LocalPLM
from pema.privacy.audit import audit
from pema.signature import signature
from pema.tasks.registry import get_task
from reproduction.lines import put_run, read_runs
from reproduction.tables.privacy import PRIVATE as RESULTS

EPSILONS = (8.0, 3.0, 1.0)
DELTA = 1e-3
SCHEDULE = Constant(0.5)


def halves(data: Data, seed: int) -> dict[str, Data]:
    """Return the data with each random half of the training examples."""
    order = np.random.default_rng(seed).permutation(len(data.train))
    middle = len(order) // 2
    parts = {"members": sorted(order[:middle]), "non-members": sorted(order[middle:])}
    return {name: replace(data, train=tuple(data.train[i] for i in part)) for name, part in parts.items()}


def configs(seed: int) -> dict[str, TrainConfig]:
    """Return the settings to compare; nothing is held out, so that all members are training examples."""
    private = {
        f"epsilon{epsilon:g}": preset("private", dp_epsilon=epsilon, dp_delta=DELTA, seed=seed) for epsilon in EPSILONS
    }
    return {"none": preset("residual", dev_fraction=0.0, seed=seed)} | private


def memory_of(plm: LocalPLM, data: Data, part: str, path: Path) -> Memory:
    """Return the memory of a part of the data, built on first use."""
    if not path.exists():
        build_memory(plm, list(data.dev if part == "dev" else data.train), get_task(data.task), path)
    return Memory.open(path)


def main() -> None:
    """Run the missing experiments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, default=Path("runs/private"), help="memories and adapters")
    parser.add_argument("--part", choices=("dev", "test"), default="test")
    parser.add_argument("--only", nargs="*", default=["plm", "none", *(f"epsilon{e:g}" for e in EPSILONS)])
    parser.add_argument("--references", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=None)
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    plm, data = LocalPLM.load("embedded", dtype="float32"), support_data()
    parts = halves(data, args.seed)
    memories = {name: memory_of(plm, part, name, args.output / name) for name, part in parts.items()}
    dev = memory_of(plm, data, "dev", args.output / "dev")
    for name in args.only:
        run = f"{name}-seed{args.seed}"
        if args.part == "test" and run in read_runs(RESULTS):
            continue
        result: dict[str, object] = {"name": name, "data": data.name}
        adapter: Adapter | None = None
        config = None if name == "plm" else configs(args.seed)[name]
        if config is not None:
            folder = args.output / f"{name}.seed{args.seed}"
            adapter, result["training"] = train(memories["members"], config, folder, resume=folder.exists())
        schedule: Schedule = NoAdapter() if adapter is None else SCHEDULE
        result["dev_perplexity"] = round(
            perplexity(dev.view(), dev.head(), adapter, None if adapter is None else schedule), 3
        )
        if args.part == "test":
            texts = generate(plm, adapter, [e.source for e in data.test], get_task(data.task), schedule)
            references = [e.target for e in data.test]
            scores = evaluate(get_task(data.task), texts, references, annotated=data.annotated["test"])
            result |= {score: round(value.value, 4) for score, value in scores.items()}
            result["metrics"] = {score: value.signature for score, value in scores.items()}
            if adapter is not None:
                result["audit"] = audit(
                    adapter,
                    memories["members"],
                    memories["non-members"],
                    references=args.references,
                    seed=args.seed,
                )
            settings = {
                "training": config and config.to_dict(),
                "schedule": SCHEDULE.to_dict(),
                "data_sha256": {part: some.digest() for part, some in parts.items()},
                "plm": plm.description.to_dict(),
            }
            result["signature"] = signature(settings, args.seed)
            put_run(RESULTS, run, result)
        print(name, {k: v for k, v in result.items() if isinstance(v, float)}, flush=True)


if __name__ == "__main__":
    main()
