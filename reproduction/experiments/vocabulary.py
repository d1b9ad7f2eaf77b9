"""The vocabulary of training with a PLM of large V: seconds, likelihood, and names that are not in the training data.

    python -m reproduction.experiments.vocabulary DATA PLM -o runs/vocabulary

DATA contains the folder `e2e-nlg`; PLM is a causal language model such as SmolLM2-135M-Instruct. Preset `residual` is
trained on 1,000 texts of the development set with each kind of vocabulary, teacher contexts, seed 0. 100 test records
whose restaurant no training record names and 100 others are scored by the perplexity of their first reference and by
the texts that the mixture generates with a constant weight of 0.7. Results go to
`reproduction/results/vocabulary.jsonl`; finished ones are kept.
"""

from __future__ import annotations

import argparse
import random
import time
from pathlib import Path
from typing import Any

from pema.adapter.module import Adapter
from pema.adapter.presets import preset
from pema.adapter.schedule import Constant
from pema.adapter.training import train
from pema.evaluation.evaluate import evaluate
from pema.evaluation.perplexity import perplexity
from pema.evaluation.slots import NAME, record
from pema.generation.decoding import generate
from pema.memory.build import build_memory
from pema.memory.reader import Memory
from pema.owner.contract import PLM
from pema.owner.opening import open_plm
from pema.signature import signature
from pema.tasks.example import Example
from pema.tasks.registry import Task
from pema.tasks.template import Template
from reproduction.data.restaurants import published
from reproduction.lines import put_run, read_runs
from reproduction.tables.vocabulary import FILE, KINDS, SETS

TASK = Task("description", Template("Describe the restaurant: \n{source}\nText:"), ("slot_errors",), "")
WEIGHT = 0.7
TRAINING, TEST = 1000, 100


def examples(folder: Path) -> tuple[list[Example], dict[str, list[dict[str, Any]]]]:
    """Return training pairs, and the test records by set: names that the training pairs lack, and others."""
    dice = random.Random(0)
    dev, test = (published(folder / "e2e-nlg" / f"{split}.jsonl.gz") for split in ("dev", "test"))
    dice.shuffle(dev)
    dice.shuffle(test)
    most = max(len(one["targets"]) for one in dev)
    pairs = [Example(one["source"], one["targets"][k]) for k in range(most) for one in dev if k < len(one["targets"])]
    train_pairs = pairs[:TRAINING]
    names = {record(pair.source)[NAME] for pair in train_pairs}
    chosen: dict[str, list[dict[str, Any]]] = {name: [] for name in SETS}
    for one in test:
        chosen[SETS[record(one["source"])[NAME] in names]].append(one)
    return train_pairs, {name: records[:TEST] for name, records in chosen.items()}


def measure(plm: PLM, adapter: Adapter, memory: Memory, records: list[dict[str, Any]]) -> dict[str, float]:
    """Return perplexity, slot error rate and the share of texts with the right name."""
    sources = [one["source"] for one in records]
    texts = generate(plm, adapter, sources, TASK, Constant(WEIGHT), max_new_tokens=80)
    named = sum(record(source)[NAME] in text for source, text in zip(sources, texts, strict=True))
    scores = evaluate(TASK, texts, [one["targets"][0] for one in records], sources=sources)
    return {
        "perplexity": perplexity(memory.view(), memory.head(), adapter, Constant(WEIGHT)),
        **{name: score.value for name, score in scores.items()},
        "names": named / len(records),
    }


def main() -> None:
    """Run the missing experiments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("plm")
    parser.add_argument("-o", "--output", type=Path, default=Path("runs/vocabulary"), help="memories and adapters")
    args = parser.parse_args()
    plm = open_plm(args.plm)
    pairs, tests = examples(args.data)
    started = time.process_time()
    memory = build_memory(plm, pairs, TASK, args.output / "memory")
    building = time.process_time() - started
    held_out = {
        name: build_memory(
            plm, [Example(one["source"], one["targets"][0]) for one in records], TASK, args.output / name
        )
        for name, records in tests.items()
    }
    for kind in KINDS:
        if kind in read_runs(FILE):
            continue
        config = preset("residual", vocabulary=kind)
        started = time.process_time()
        adapter, figures = train(memory, config, args.output / kind, resume=True)
        seconds = time.process_time() - started
        scores = {name: measure(plm, adapter, held_out[name], records) for name, records in tests.items()}
        put_run(
            FILE,
            kind,
            {
                "processor_seconds": round(seconds, 1),
                "building_processor_seconds": round(building, 1),
                "pairs": memory.pairs,
                "seen": len(memory.view().targets_seen()),
                "vocabulary_size": memory.manifest.plm.vocabulary_size,
                "epochs": figures["epochs"],
                "held_out_cross_entropy": figures["held_out_cross_entropy"],
                "scores": scores,
                "signature": signature({"vocabulary": kind, "preset": "residual", "plm": plm.description.name}, 0),
            },
        )


if __name__ == "__main__":
    main()
