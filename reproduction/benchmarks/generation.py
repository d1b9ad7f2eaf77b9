"""Step 4: seconds per token with the adapter attached, against the PLM without it, by the model's own `generate`.

Greedy, a fixed number of new tokens for every row (`min_new_tokens` keeps the end-of-sequence token out, with and
without the adapter), prompts of the corpus with left padding; the time includes the pass over the prompt. The weight is
a constant 0.5, so that the adapter works at every step: Gradual Unrolling omits it if its weight is zero, and costs
less. The adapters have random weights of the presets' shapes.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pema.adapter.module import Adapter
from pema.adapter.schedule import Constant
from pema.generation.mixture import mix_logits
from pema.generation.plugin import attach
from pema.owner.local import LocalPLM
from reproduction.benchmarks.inputs import GENERATING, examples, open_plm, random_adapter, task
from reproduction.benchmarks.options import Options
from reproduction.benchmarks.timing import Run, alternate, breakdown, paired_ratio, row, significant, timing

AIM, COPYING_AIM = "<= 1.05", "<= 1.15"
"""Aims of adapters without and with copying from the prompt."""

ROUNDS = {1: 4, 32: 2}
"""Number of timed rounds for each of `Options.repeats`, by batch size: short runs are repeated more often."""


class GenerationCase:
    """A PLM and one batch of prompts."""

    def __init__(self, plm: LocalPLM, options: Options, batch_size: int) -> None:
        self.plm, self.new_tokens = plm, options.new_tokens
        some = [examples(options)[i % options.examples] for i in range(min(batch_size, options.examples))]
        some = [some[i % len(some)] for i in range(batch_size)]
        prompts = [one.prompt for one in task(options).template.encode_prompts(plm.tokenizer, [e.source for e in some])]
        columns = max(map(len, prompts))
        pad = plm.tokenizer.pad_token_id or 0
        device = plm.model.device
        self.ids = torch.tensor([[pad] * (columns - len(prompt)) + list(prompt) for prompt in prompts], device=device)
        self.mask = torch.tensor(
            [[0] * (columns - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device
        )
        self.pad = pad

    @torch.no_grad()
    def generate(self) -> Tensor:
        """Generate: (batch, columns + new tokens)."""
        out: Tensor = self.plm.model.generate(
            input_ids=self.ids,
            attention_mask=self.mask,
            max_new_tokens=self.new_tokens,
            min_new_tokens=self.new_tokens,
            do_sample=False,
            num_beams=1,
            pad_token_id=self.pad,
        )
        return out

    def with_adapter(self, adapter: Adapter) -> Tensor:
        """Generate with `adapter` at the output head."""
        plm = self.plm
        with attach(plm.model, adapter, plm.head(), Constant(0.5), tokenizer=plm.tokenizer):
            return self.generate()


def run(options: Options, _folder: Path) -> dict[str, Any]:
    """Measure all batch sizes, with and without an adapter."""
    plm = open_plm(options)
    d, V = plm.description.d, plm.description.vocabulary_size
    adapters = {name: random_adapter(name, d, V, options.seed).to(plm.model.device) for name in GENERATING}
    result: dict[str, Any] = {
        "summary": [],
        "plm": plm.description.name,
        "new_tokens": options.new_tokens,
        "batches": [],
    }
    for batch_size in options.batch_sizes:
        generating = GenerationCase(plm, options, batch_size)
        runs: dict[str, Run] = {"without": generating.generate}
        runs |= {name: _with(generating, adapter) for name, adapter in adapters.items()}
        times = alternate(runs, options.repeats * ROUNDS.get(batch_size, 1))
        per_token = {name: [seconds / options.new_tokens for seconds in t] for name, t in times.items()}
        batch: dict[str, Any] = {"batch_size": batch_size, "prompt_columns": generating.ids.shape[1]}
        batch["seconds_per_step"] = {name: timing(t) for name, t in per_token.items()}
        for name, adapter in adapters.items():
            ratio = paired_ratio(times[name], times["without"])
            batch.setdefault("ratio", {})[name] = ratio
            milliseconds = batch["seconds_per_step"][name]["median_seconds"] * 1e3
            aim = COPYING_AIM if adapter.config.copy_width else AIM
            what = f"preset {name}, r {adapter.config.rank}, batch {batch_size}"
            result["summary"].append(row(what, milliseconds, "ms/step", "without adapter", ratio, aim))
        batch["where_it_goes"] = {
            "milliseconds of a step, each alone": {
                name: stages(plm, adapter, batch_size, options) for name, adapter in adapters.items()
            },
            "without, profiled": breakdown(generating.generate),
            "residual, profiled": breakdown(_with(generating, adapters["residual"])),
            "best, profiled": breakdown(_with(generating, adapters["best"])),
        }
        result["batches"].append(batch)
    return result


def _with(generating: GenerationCase, adapter: Adapter) -> Run:
    return lambda: generating.with_adapter(adapter)


def stages(plm: LocalPLM, adapter: Adapter, batch_size: int, options: Options) -> dict[str, float]:
    """Measure the adapter's parts of a step separately: its own products, the second product with W_hd, the mixture."""
    d, V = plm.description.d, plm.description.vocabulary_size
    weight = plm.head().weight
    f, logits = torch.randn(batch_size, d, device=weight.device), torch.randn(batch_size, 2, V, device=weight.device)
    half = torch.full((batch_size, 1, 1), 0.5, device=weight.device).log()
    single, double = f.to(weight.dtype), torch.cat((f, f)).to(weight.dtype)
    runs: dict[str, Run] = {
        "adapter": lambda: adapter(f),
        "head, f alone": lambda: single @ weight.T,
        "head, f and h_pd": lambda: double @ weight.T,
        "mixture": lambda: mix_logits(logits, half, half),
    }
    with torch.no_grad():
        times = alternate(runs, 10 * options.repeats, warm_up=3)
    return {name: significant(timing(t)["median_seconds"] * 1e3) for name, t in times.items()}


def parts(options: Options, _folder: Path) -> dict[str, Run]:
    """Return the parts to run in separate processes for their peak memory, each including the PLM's weights."""

    def one(name: str | None, batch_size: int) -> Run:
        def generate() -> None:
            plm = open_plm(options)
            with contextlib.ExitStack() as stack:
                if name is not None:
                    described = plm.description
                    adapter = random_adapter(name, described.d, described.vocabulary_size, options.seed)
                    at = attach(plm.model, adapter, plm.head(), Constant(0.5), tokenizer=plm.tokenizer)
                    stack.enter_context(at)
                GenerationCase(plm, options, batch_size).generate()

        return generate

    largest = max(options.batch_sizes)
    return {
        f"{'without' if name is None else 'preset ' + name}, batch {largest}": one(name, largest)
        for name in (None, *GENERATING)
    }
