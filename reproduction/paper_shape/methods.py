"""Methods of `paper_shape`: one function per method, which builds everything that it needs, with random weights.

The language model is OPT (Zhang et al. 2022) at the given shape, made from a config. Weights do not change memory or
time. A step of training a language model is one forward and backward pass over `Setting.batch_size` sequences of
`Setting.length` tokens and one step of Adam (fused: no temporary copies of all gradients).
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import faiss
import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor, nn
from transformers import OPTForCausalLM, PreTrainedTokenizerFast

from pema.adapter.module import Adapter
from pema.adapter.schedule import Constant
from pema.adapter.training import train
from pema.devices import has_bfloat16
from pema.generation.plugin import attach
from pema.memory.reader import Memory
from pema.owner.head import Head
from reproduction.benchmarks import inputs, options
from reproduction.benchmarks.timing import alternate, paired_ratio, significant
from reproduction.models.opt import opt
from reproduction.paper_shape.options import METHODS, Setting, Shape, kept_layers

LORA_RANK = 16
NEIGHBOURS = 1024
"""Number k of neighbours of kNN-LM (Khandelwal et al. 2020)."""


def language_model(shape: Shape, device: torch.device, *, layers: int, dtype: torch.dtype) -> OPTForCausalLM:
    """Build OPT with random weights, for training."""
    model = opt(shape, device, layers=layers, dtype=dtype)
    model.config.use_cache = False
    return model


def train_steps(model: nn.Module, shape: Shape, setting: Setting, device: torch.device) -> dict[str, Any]:
    """Run some steps of Adam on the parameters that are not frozen; return the median time of all but the first."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr=1e-5, fused=True)
    draw = torch.Generator().manual_seed(0)
    model.train()
    times = []
    for _ in range(setting.steps):
        ids = torch.randint(shape.V, (setting.batch_size, setting.length), generator=draw).to(device)
        started = time.perf_counter()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        finish(device)
        times.append(time.perf_counter() - started)
    return step_of(times[1:], setting.batch_size * setting.length) | {
        "trainable_parameters": sum(p.numel() for p in parameters),
        "parameters": sum(p.numel() for p in model.parameters()),
        "optimizer": "Adam, fused, float32 moments",
    }


def step_of(times: Iterable[float], tokens: int) -> dict[str, Any]:
    """Return the seconds per step and per token (or pair)."""
    seconds = statistics.median(times)
    each = significant(seconds / tokens)
    return {"seconds_per_step": significant(seconds), "tokens_per_step": tokens, "seconds_per_token": each}


def finish(device: torch.device) -> None:
    """Wait for an accelerator."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def full(shape: Shape, setting: Setting, device: torch.device, _memory: Path, _out: Path) -> dict[str, Any]:
    """Measure full fine-tuning in float32."""
    model = language_model(shape, device, layers=shape.layers, dtype=torch.float32)
    return train_steps(model, shape, setting, device)


def lora(dtype: torch.dtype) -> Callable[..., dict[str, Any]]:
    """Measure LoRA (Hu et al. 2022) on the query and value projections of every layer, on a frozen base in `dtype`."""

    def run(shape: Shape, setting: Setting, device: torch.device, _memory: Path, _out: Path) -> dict[str, Any]:
        model = language_model(shape, device, layers=shape.layers, dtype=dtype)
        config = LoraConfig(r=LORA_RANK, lora_alpha=2 * LORA_RANK, target_modules=["q_proj", "v_proj"])
        return train_steps(get_peft_model(model, config), shape, setting, device) | {"rank": LORA_RANK}

    return run


def offsite(shape: Shape, setting: Setting, device: torch.device, _memory: Path, _out: Path) -> dict[str, Any]:
    """Measure Offsite-Tuning (Xiao et al. 2023) at the data owner: trained first and last layers around an emulator.

    The emulator is frozen and has fewer layers than the PLM has there; `kept_layers` says how many.
    """
    emulator, adapters = kept_layers(shape.layers)
    model = language_model(shape, device, layers=emulator + 2 * adapters, dtype=torch.float32)
    model.requires_grad_(False)
    layers = model.model.decoder.layers
    for layer in (*layers[:adapters], *layers[-adapters:]):
        layer.requires_grad_(True)
    figures = train_steps(model, shape, setting, device)
    return figures | {"emulator_layers": emulator, "trained_layers": 2 * adapters, "layers_of_the_plm": shape.layers}


def knn(_shape: Shape, setting: Setting, device: torch.device, memory: Path, _out: Path) -> dict[str, Any]:
    """Measure kNN-LM (Khandelwal et al. 2020): an exact FAISS index of a memory, searched once per generation step."""
    opened = Memory.open(memory)
    started = time.perf_counter()
    index = faiss.IndexFlatL2(opened.d)
    for batch in opened.view().batches(1024):
        index.add(batch.representations.numpy())
    seconds = time.perf_counter() - started
    queries = np.random.default_rng(0).standard_normal((setting.queries, 1, opened.d), np.float32)
    k = min(NEIGHBOURS, opened.pairs)
    times = []
    for query in queries:
        started = time.perf_counter()
        index.search(query, k)
        times.append(time.perf_counter() - started)
    return {
        "pairs": opened.pairs,
        "build_seconds": significant(seconds),
        "seconds_per_token": significant(seconds / opened.pairs),
        "index_bytes": opened.pairs * opened.d * 4,
        "k": k,
        "search_seconds": significant(statistics.median(times)),
        "searched_on": "cpu",
    }


def pema(preset: str, precision: Literal["auto", "float32"] = "auto") -> Callable[..., dict[str, Any]]:
    """Measure `pema train`: verification of the memory, reconstruction, an epoch of joint retraining, writing files."""

    def run(shape: Shape, _setting: Setting, device: torch.device, memory: Path, out: Path) -> dict[str, Any]:
        opened = Memory.open(memory)
        config = replace(inputs.TIMED[preset], epochs=1, precision=precision, device=str(device)).fitted(shape.d)
        _, figures = train(opened, config, out)
        bfloat16 = precision == "auto" and has_bfloat16(device)
        return step_of([config.batch_size / figures["pairs_per_second"]], config.batch_size) | {
            "rank": config.rank,
            "pairs": opened.pairs,
            "trainable_parameters": figures["parameters"],
            "reconstruction_seconds": figures.get("reconstruction_seconds"),
            "products_in": "bfloat16" if bfloat16 else "float32",
            "W_hd_stored_as": str(opened.head().weight.dtype).removeprefix("torch."),
        }

    return run


def owner(shape: Shape, setting: Setting, device: torch.device, _memory: Path, _out: Path) -> dict[str, Any]:
    """Measure the PLM owner's side: the pass that builds a memory, and generation with and without adapter, batch 1.

    The PLM is in bfloat16 where the device multiplies that itself, else in float32. The weight is a constant 0.5, so
    that the adapter works at every step.
    """
    dtype = torch.bfloat16 if has_bfloat16(device) else torch.float32
    model = language_model(shape, device, layers=shape.layers, dtype=dtype).eval()
    model.config.use_cache = True
    head, tokenizer = Head(model.lm_head.weight), tokenizer_of(shape.V)
    prompt = torch.randint(4, shape.V, (1, setting.prompt), generator=torch.Generator().manual_seed(0)).to(device)
    context = prompt.repeat(1, -(-setting.length // setting.prompt))[:, : setting.length]

    @torch.no_grad()
    def generate() -> Tensor:
        mask, tokens = torch.ones_like(prompt), setting.new_tokens
        sequences: Tensor = model.generate(
            input_ids=prompt, attention_mask=mask, do_sample=False, max_new_tokens=tokens, min_new_tokens=tokens
        )
        finish(device)
        return sequences

    @torch.no_grad()
    def represent() -> None:
        model.model(input_ids=context, use_cache=False)
        finish(device)

    def plugged(adapter: Adapter) -> Callable[[], object]:
        def run() -> None:
            with attach(model, adapter, head, Constant(0.5), tokenizer=tokenizer):
                generate()

        return run

    runs: dict[str, Callable[[], object]] = {"represent": represent, "alone": generate}
    for name in inputs.GENERATING:
        runs[name] = plugged(inputs.random_adapter(name, shape.d, shape.V))
    times = alternate(runs, setting.repeats)
    per_token = {name: statistics.median(t) / setting.new_tokens for name, t in times.items() if name != "represent"}
    return {
        "dtype": str(dtype).removeprefix("torch."),
        "parameters": sum(p.numel() for p in model.parameters()),
        "represent_seconds_per_token": significant(statistics.median(times["represent"]) / setting.length),
        "generate_seconds_per_token": {name: significant(value) for name, value in per_token.items()},
        "ratio": {name: paired_ratio(times[name], times["alone"]) for name in inputs.GENERATING},
    }


def tokenizer_of(V: int) -> PreTrainedTokenizerFast:
    """Return a tokenizer of V words, with which an adapter that copies looks words of the prompt up."""
    words = {f"Ġw{i}": i for i in range(V)}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(words, unk_token="Ġw0")))


RUN: dict[str, Callable[..., dict[str, Any]]] = {
    "full": full,
    "lora": lora(torch.float32),
    "lora-bfloat16": lora(torch.bfloat16),
    "offsite": offsite,
    "knn": knn,
    "pema-paper": pema("paper"),
    "pema-paper-float32": pema("paper", "float32"),
    "pema-best": pema("residual"),  # the name of these results, from before `best` copied
    "owner": owner,
}
assert tuple(RUN) == METHODS


def memory_path(shape: Shape, pairs: int, folder: Path) -> Path:
    """Return a memory of a number of pairs, written on first use, with float16 representations and W_hd as in OPT."""
    size, given = options.Shape(shape.name, shape.d, shape.V), options.Options(pairs=pairs)
    return inputs.synthetic_memory(given, size, folder / str(pairs), stored=torch.float16, to_learn=False).path
