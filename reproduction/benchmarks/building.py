"""Step 1: tokens per second of `represent` and of the whole `build_memory`, against the PLM's bare forward pass.

The bare forward pass ("replayed") is every call that a build makes of the PLM's base model (the module below the LM
head), recorded and repeated with the same inputs: the same length-bucketed batches, the same padding, the same cache
of the shared instruction; no LM head, no tap, and outputs are discarded. "Unshared" is the base model on the same
sequences, bucketed by length in the same way, with the instruction computed again in every row; its counterpart is a
build that does the same. A token is one that the PLM reads in the unshared pass, without padding; the rate of every
variant is per these tokens, so that rates compare as times do. Ratios are those of the shortest times.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import shutil
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import nn

from pema.memory.build import build_memory
from pema.memory.config import BuildConfig
from pema.memory.encoding import Tokens
from pema.owner.batching import length_batches, pad_right
from pema.owner.causal_lm import state_argument
from pema.owner.local import LocalPLM
from pema.owner.local import plm as local
from reproduction.benchmarks.inputs import examples, open_plm, requested, task
from reproduction.benchmarks.options import Options
from reproduction.benchmarks.timing import SHORTEST, Run, breakdown, least_ratio, rate, row, seconds, significant

AIM, AIM_ON_ACCELERATOR = ">= 0.85", ">= 0.9"


class BuildingCase:
    """A PLM and a corpus, and the variants that are timed with them."""

    def __init__(self, options: Options, folder: Path) -> None:
        self.plm, self.task = open_plm(options), task(options)
        self.batch_tokens = options.batch_tokens
        self.examples = examples(options)
        self.output = folder / "building"
        self.tokens = Tokens.encode(self.plm, self.task.template, self.examples)
        self.sequences, self.starts = requested(self.tokens)
        self.read = sum(len(sequence) - 1 for sequence in self.sequences)

    @cached_property
    def base(self) -> nn.Module:
        """The PLM without its LM head: the first module that the model's forward pass calls."""
        called: list[nn.Module] = []
        modules = [module for module in self.plm.model.modules() if module is not self.plm.model]
        handles = [module.register_forward_pre_hook(lambda module, _args: called.append(module)) for module in modules]
        try:
            with torch.inference_mode():
                self.plm.model(input_ids=torch.tensor([self.sequences[0]]).to(self.plm.model.device))
        finally:
            for handle in handles:
                handle.remove()
        return called[0]

    def build(self) -> None:
        """Run `build_memory` into an empty folder."""
        build_memory(self.plm, self.examples, self.task, self.output, batch_tokens=self.batch_tokens)

    def build_unshared(self) -> None:
        """Run `build_memory` as `build`, with the instruction computed again in every row."""
        with unshared():
            self.build()

    def clear(self) -> None:
        """Remove the memory before the next build."""
        shutil.rmtree(self.output, ignore_errors=True)

    def groups(self) -> Iterator[range]:
        """Return the groups of examples that `build_memory` requests."""
        count = len(self.sequences)
        size = BuildConfig().examples_per_shard
        for start in range(0, count, size):
            yield range(start, min(start + size, count))

    def encode(self) -> None:
        """Tokenise and check the examples."""
        Tokens.encode(self.plm, self.task.template, self.examples)

    def represent(self) -> None:
        """Run `represent` for the groups of examples that `build_memory` requests."""
        for group in self.groups():
            asked = [self.sequences[i] for i in group], [self.starts[i] for i in group]
            for _ in self.plm.represent(*asked, batch_tokens=self.batch_tokens):
                pass

    def recorded(self) -> list[dict[str, Any]]:
        """Return the arguments of every call of the base model by `represent`."""
        calls: list[dict[str, Any]] = []
        names, state = inspect.signature(self.base.forward), state_argument(self.base)

        def record(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            given = names.bind_partial(*args).arguments | kwargs
            calls.append(with_fresh(given, state))

        handle = self.base.register_forward_pre_hook(record, with_kwargs=True)
        try:
            self.represent()
        finally:
            handle.remove()
        return calls

    @torch.inference_mode()
    def replay(self, calls: list[dict[str, Any]]) -> None:
        """Repeat recorded calls."""
        state = state_argument(self.base)
        for call in calls:
            self.base(**with_fresh(call, state))

    @torch.inference_mode()
    def unshared(self) -> None:
        """Run the base model on whole sequences."""
        for group in self.groups():
            for batch in length_batches([len(self.sequences[i]) - 1 for i in group], self.batch_tokens):
                tokens = pad_right([self.sequences[group[i]][:-1] for i in batch])
                self.base(input_ids=tokens.to(self.plm.model.device), use_cache=False)


@contextlib.contextmanager
def unshared() -> Iterator[None]:
    """Encode no common prefix separately inside the block."""
    with (
        mock.patch.object(local, "pays", return_value=False),
        mock.patch.object(LocalPLM, "prompt_prefix", return_value=None),
    ):
        yield


def with_fresh(call: dict[str, Any], state: str | None) -> dict[str, Any]:
    """Return the arguments of a call with a separate state, called `state`; None if the model has no state."""
    return call if state is None else call | {state: fresh(call.get(state))}


def fresh(cache: Any) -> Any:  # noqa: ANN401
    """Return a key-value cache that a forward pass may fill, with the same keys and values."""
    if cache is None:
        return None
    copied = copy.copy(cache)
    copied.layers = [copy.copy(layer) for layer in cache.layers]
    return copied


def run(options: Options, folder: Path) -> dict[str, Any]:
    """Measure all variants in alternation."""
    building = BuildingCase(options, folder)
    building.represent()  # The first use tries optimisations.
    building.clear()
    building.build()  # The first build hashes the weights.
    calls = building.recorded()
    runs: dict[str, Run] = {
        "forward, replayed": lambda: building.replay(calls),
        "represent": building.represent,
        "build_memory": building.build,
        "forward, unshared": building.unshared,
        "build_memory, unshared": building.build_unshared,
        "encode": building.encode,
    }
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(options.repeats):
        for name, run_one in runs.items():
            building.clear()
            times[name].append(seconds(run_one, options.clock))
    building.clear()
    measured = {name: rate(building.read, "tokens", t) for name, t in times.items() if name != "encode"}
    aim = AIM if options.device == "cpu" else AIM_ON_ACCELERATOR
    least = {name: min(t) for name, t in times.items()}
    summary = [
        row(name, building.read / least[name], "tokens/s", floor, least_ratio(times[floor], times[name]), goal)
        for name, floor, goal in (
            ("represent", "forward, replayed", aim),
            ("build_memory", "forward, replayed", aim),
            ("build_memory, unshared", "forward, unshared", aim),
            ("build_memory", "forward, unshared", ""),
        )
    ]
    spent = {
        "forward pass": least["forward, replayed"],
        "reading the tap, batching, padding": least["represent"] - least["forward, replayed"],
        "encoding": least["encode"],
        "pairing, storing, writing, syncing": least["build_memory"] - least["represent"] - least["encode"],
    }
    return {
        "summary": summary,
        "ratios_of": SHORTEST,
        "plm": building.plm.description.name,
        "parameters": building.plm.description.parameters,
        "examples": len(building.examples),
        "tokens": building.read,
        "target_tokens": int(building.tokens.target_lengths.sum()),
        "batch_tokens": options.batch_tokens,
        "calls": [list(call["input_ids"].shape) for call in calls],
        "measured": measured,
        "where_it_goes": {
            "seconds of a build": {name: significant(value) for name, value in spent.items()},
            "represent, profiled": breakdown(building.represent),
        },
    }


def parts(options: Options, folder: Path) -> dict[str, Run]:
    """Return the parts to run in separate processes for their peak memory, each including the PLM's weights."""

    def represent() -> None:
        BuildingCase(options, folder / "peak").represent()

    def build() -> None:
        building = BuildingCase(options, folder / "peak")
        building.clear()
        building.build()
        building.clear()

    def forward() -> None:
        building = BuildingCase(options, folder / "peak")
        building.unshared()

    return {"represent": represent, "build_memory": build, "forward, unshared": forward}
