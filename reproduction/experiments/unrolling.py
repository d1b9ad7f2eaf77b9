"""Gradual Unrolling on a real PLM: lambda_max, SL and course of the schedule, on two kinds of tasks.

    python -m reproduction.experiments.unrolling DATA PLM -o runs/unrolling

DATA contains the folders `e2e-nlg` and `asset`; PLM is a causal language model such as SmolLM2-135M-Instruct. For each
task, kind of contexts and preset one adapter is trained on 500 examples, and texts are generated for 60 dev examples
with each schedule; with `predicted` contexts, the paper's preset and further seeds only some are measured. `--test`
adds 100 test examples for what dev data choose. Results go to `reproduction/results/unrolling.jsonl`, one line per
adapter; what is in them is kept.
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pema.adapter.likelihood import log_p
from pema.adapter.module import Adapter
from pema.adapter.presets import preset
from pema.adapter.schedule import Constant, Linear, NoAdapter, Schedule
from pema.adapter.training import train
from pema.evaluation.evaluate import evaluate
from pema.evaluation.perplexity import LOGITS_BYTES
from pema.experiments.data import restaurant_data
from pema.generation.config import with_own_ending
from pema.generation.decoding import decode
from pema.generation.mixture import mix
from pema.generation.plugin import attach
from pema.memory.build import build_memory
from pema.memory.reader import Memory
from pema.owner.contract import PLM
from pema.owner.opening import open_plm
from pema.signature import signature
from pema.tasks.example import Example
from pema.tasks.registry import Task, get_task
from reproduction.data.restaurants import published
from reproduction.lines import put_run, read_runs
from reproduction.tables.unrolling import FILE, METRICS, PAPER, Point, name_of, reported

TRAINING, DEV, TEST, SEEDS, BATCH, SAMPLES = 500, 60, 100, (0, 1, 2), 60, 6

MAIN = [Point("square", PAPER), Point("linear", PAPER), Point("constant", 0.7), Point("constant", 1.0)]
"""Schedules that are measured with all seeds."""

POINTS = [
    *MAIN,
    Point("none"),
    Point("square", PAPER, "4 input"),
    Point("constant", 0.5),
    Point("square", 1.0),
    Point("constant", 0.9),
    Point("square", PAPER, "mean target"),
    Point("linear", 1.0),
    Point("constant", 0.3),
    Point("square", 0.5),
    Point("square", PAPER, "target"),
    Point("fitted"),
]
"""Schedules that are measured with the first seed, the most telling ones first."""

FEW = 8
"""Number of them that are measured with `predicted` contexts."""


@dataclass(frozen=True)
class Unrolling:
    """lambda_t = (lambda_max max(0, 1 - t / SL))^power, for an SL that the caller gives."""

    lambda_max: float
    power: int

    def weights(self, step: Tensor, input_length: Tensor) -> Tensor:
        """See `Schedule.weights`."""
        return Linear(self.lambda_max).weights(step, input_length) ** self.power


class Kind(NamedTuple):
    """A kind of task: its prompts and its examples."""

    task: Task
    train: list[Example]
    dev: list[Example]
    test: list[Example]


def records(folder: Path) -> Kind:
    """Return records of restaurants to texts about them, as in the demo; dev records are others of the test set."""
    data = restaurant_data()
    shipped = {example.source for example in data.test}
    others = [one for one in published(folder / "e2e-nlg" / "test.jsonl.gz") if one["source"] not in shipped]
    task = get_task("data-to-text", "Describe this restaurant in one or two sentences: \n{source}\nDescription:")
    return Kind(task, list(data.train[:TRAINING]), _drawn(others, DEV), list(data.test))


def simplification(folder: Path) -> Kind:
    """Return sentences to simpler ones of about the same length; dev sentences are others of the training part."""
    parts = {}
    for part in ("train", "test"):
        with gzip.open(folder / "asset" / f"{part}.jsonl.gz", "rt", encoding="utf-8") as lines:
            parts[part] = [json.loads(line) for line in lines]
    drawn = _drawn(parts["train"], TRAINING + DEV)
    dice = random.Random(0)
    pairs = [Example(one.source, dice.choice(one.references)) for one in drawn[:TRAINING]]
    task = get_task("style", "Rewrite this sentence in simpler words: \n{source}\nSimpler:")
    return Kind(task, pairs, drawn[TRAINING:], _drawn(parts["test"], TEST))


KINDS = {"records": records, "simplification": simplification}


def _drawn(rows: Sequence[dict[str, Any]], count: int) -> list[Example]:
    chosen = random.Random(0).sample(list(rows), count)
    return [Example(one["source"], one["targets"][0], alternatives=tuple(one["targets"][1:])) for one in chosen]


@dataclass(frozen=True)
class Adapted:
    """A PLM with an adapter: what schedules are measured on."""

    plm: PLM
    adapter: Adapter
    task: Task
    mean_target: float

    def schedule(self, point: Point) -> Schedule:
        """Return the schedule of a point."""
        if point.course == "none":
            return NoAdapter()
        if point.course == "fitted":
            return self.adapter.config.choose_schedule("fitted", None)
        if point.course == "constant":
            return Constant(point.lambda_max)
        return Unrolling(point.lambda_max, 2 if point.course == "square" else 1)

    def lengths(self, point: Point, inputs: Sequence[int], targets: Sequence[int]) -> list[int]:
        """Return SL of each example, from the lengths of its input and of its first target."""
        if point.length == "target":
            return list(targets)
        if point.length == "mean target":
            return [round(self.mean_target)] * len(inputs)
        times, _, found = point.length.rpartition(" ")
        assert found == "input", point
        return [int(times or 1) * length for length in inputs]

    def generate(self, point: Point, examples: Sequence[Example]) -> tuple[list[str], float]:
        """Return a text for each example, and their mean length in tokens."""
        encoded = self.task.template.encode_prompts(self.plm.tokenizer, examples)
        # Sorted as `decode` sorts, so that the lengths can follow the rows of its batches.
        order = sorted(range(len(examples)), key=lambda i: len(encoded[i].prompt), reverse=True)
        sorted_examples = [examples[i] for i in order]
        targets = target_lengths(self.plm, self.task, sorted_examples)
        lengths = iter(self.lengths(point, [encoded[i].source_length for i in order], targets))
        head, schedule, model = self.plm.head(), self.schedule(point), self.plm.generator
        with attach(model, self.adapter, head, schedule, description=self.plm.description) as attached:
            ending = with_own_ending(self.adapter.config, {"batch_size": BATCH})
            found = decode(
                self.plm,
                model,
                sorted_examples,
                self.task,
                lambda inputs: attached.inputs([next(lengths) for _ in inputs]),
                **ending,
            )
        texts = dict(zip(order, found.texts, strict=True))
        return [texts[i] for i in range(len(examples))], found.tokens / len(examples)


def target_lengths(plm: PLM, task: Task, examples: Sequence[Example]) -> list[int]:
    """Return the number of tokens of each first target, with its end."""
    return [len(encoded.target) for encoded in task.template.encode(plm.tokenizer, first_targets(examples))]


def first_targets(examples: Sequence[Example]) -> list[Example]:
    """Return the examples with their first target only."""
    return [replace(example, alternatives=()) for example in examples]


@torch.no_grad()
def likelihoods(adapted: Adapted, memory: Memory) -> dict[str, Tensor]:
    """Return log P_LM and log P_PEMA of the pairs of a memory, with their steps and input lengths."""
    head, adapter = memory.head(), adapted.adapter.eval()
    parts: dict[str, list[Tensor]] = {name: [] for name in ("plm", "pema", "steps", "lengths")}
    for batch in memory.view().batches(max(16, LOGITS_BYTES // (4 * head.vocabulary_size))):
        f, y = batch.representations, batch.targets
        parts["plm"].append(log_p(head, f, y))
        parts["pema"].append(log_p(head, adapter(f), y, adapter.tokens))
        parts["steps"].append(batch.steps)
        parts["lengths"].append(batch.source_lengths)
    return {name: torch.cat(some) for name, some in parts.items()}


def perplexity(adapted: Adapted, point: Point, found: dict[str, Tensor]) -> float | None:
    """Return the perplexity of the mixture; None where SL is not that of the pairs."""
    if point.length == "target":
        return None
    lengths = torch.tensor(adapted.lengths(point, found["lengths"].tolist(), []))
    weights = adapted.schedule(point).weights(found["steps"], lengths)
    mixed = mix(found["plm"][:, None], found["pema"][:, None], weights)
    return float(torch.exp(-mixed.double().mean()))


def measure(adapted: Adapted, point: Point, kind: str, examples: Sequence[Example]) -> dict[str, Any]:
    """Return the scores of a schedule, and the first texts where the licence of the data allows it."""
    texts, tokens = adapted.generate(point, examples)
    references = [each.references for each in examples]
    sources = [each.source for each in examples]
    scores = evaluate(adapted.task, texts, references, sources=sources, metrics=METRICS[kind])
    result = {name: round(score.value, 3) for name, score in scores.items()} | {"tokens": round(tokens, 1)}
    return result | ({"texts": texts[:SAMPLES]} if kind == "records" else {})


def main() -> None:
    """Run the missing measurements."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("plm")
    parser.add_argument("-o", "--output", type=Path, default=Path("runs/unrolling"), help="memories and adapters")
    parser.add_argument("--only", metavar="TEXT", default="", help="adapters whose name contains this")
    parser.add_argument("--most", type=int, default=len(POINTS), metavar="N", help="schedules of an adapter")
    parser.add_argument("--test", action="store_true", help="also measure on test what dev data choose")
    args = parser.parse_args()
    plm = open_plm(args.plm)
    for seed in SEEDS:
        for name, contexts in ((name, contexts) for contexts in ("teacher", "predicted") for name in KINDS):
            for named in ("residual", "paper"):
                run = name_of(name, contexts, named, seed)
                if args.only in run and (seed == 0 or named == "residual"):
                    _run(plm, args, run, name, contexts, named, seed)


def _run(plm: PLM, args: argparse.Namespace, run: str, name: str, contexts: str, named: str, seed: int) -> None:
    """Train one adapter and measure the schedules that its line lacks."""
    kind = KINDS[name](args.data)
    memory = _memory(plm, kind.task, kind.train, args.output / f"{name}-{contexts}", contexts=contexts)
    adapter, figures = train(memory, preset(named, seed=seed), args.output / run, resume=True)
    targets = target_lengths(plm, kind.task, kind.train)
    adapted = Adapted(plm, adapter, kind.task, sum(targets) / len(targets))
    dev = _memory(plm, kind.task, first_targets(kind.dev), args.output / f"{name}-dev", contexts="teacher")
    found = likelihoods(adapted, dev)
    config = {"task": name, "contexts": contexts, "preset": named, "plm": plm.description.name}
    line: dict[str, Any] = {
        **config,
        "seed": seed,
        "examples": {"train": len(kind.train), "dev": len(kind.dev), "test": len(kind.test)},
        "mean_target": round(adapted.mean_target, 1),
        "mean_input": round(sum(_inputs(plm, kind)) / len(kind.dev), 1),
        "held_out_cross_entropy": figures["held_out_cross_entropy"],
        "agreement": memory.manifest.agreement,
        "sources": [each.source for each in kind.dev[:SAMPLES]] if name == "records" else [],
        "dev": {},
        "test": {},
        **read_runs(FILE).get(run, {}),
        "signature": signature(config, seed),
    }
    points = MAIN if seed or named == "paper" else POINTS[:FEW] if contexts == "predicted" else POINTS
    for point in points[: args.most]:
        if point.key not in line["dev"]:
            scores = measure(adapted, point, name, kind.dev) | {"perplexity": perplexity(adapted, point, found)}
            _put(run, line, "dev", point, scores)
    for point in reported(line) if args.test else ():
        if point.key not in line["test"]:
            _put(run, line, "test", point, measure(adapted, point, name, kind.test))


def _put(run: str, line: dict[str, Any], part: str, point: Point, scores: dict[str, Any]) -> None:
    line[part][point.key] = scores
    put_run(FILE, run, line)
    print(run, part, point.key, {key: value for key, value in scores.items() if key != "texts"}, flush=True)


def _inputs(plm: PLM, kind: Kind) -> list[int]:
    return [prompt.source_length for prompt in kind.task.template.encode_prompts(plm.tokenizer, kind.dev)]


def _memory(plm: PLM, task: Task, examples: list[Example], path: Path, *, contexts: str) -> Memory:
    return Memory.open(path) if path.exists() else build_memory(plm, examples, task, path, contexts=contexts)


if __name__ == "__main__":
    main()
