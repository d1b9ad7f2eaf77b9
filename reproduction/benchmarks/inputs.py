"""Inputs of the benchmarks: examples, memories of a PLM, synthetic memories at named shapes, random adapters."""

from __future__ import annotations

import hashlib
import random
from dataclasses import replace
from importlib import resources
from pathlib import Path

import torch
from torch import Tensor

from pema.adapter.config import AdapterConfig
from pema.adapter.module import Adapter
from pema.adapter.presets import PRESETS
from pema.devices import has_bfloat16
from pema.experiments.data import restaurant_data
from pema.memory.build import build_memory
from pema.memory.encoding import Tokens
from pema.memory.manifest import HEAD, FileEntry, Input, Manifest
from pema.memory.reader import Memory, View
from pema.memory.shard import Contents, write_shard
from pema.owner.contract import PLMDescription
from pema.owner.head import Head
from pema.owner.local import LocalPLM
from pema.tasks.example import Example
from pema.tasks.readers import read_examples
from pema.tasks.registry import Task, get_task
from reproduction.benchmarks.options import DEMO, NONE, RESTAURANTS, Options, Shape
from reproduction.million_pairs.source import tokenizer as word_tokenizer
from reproduction.models.opt import opt
from reproduction.paper_shape.options import SHAPES

PAIRS_PER_EXAMPLE = 16
PAIRS_PER_SHARD = 8192
MOST_TO_LEARN = 1 << 15
WORDS = "the house order is small please your we will send today parcel when can you tell me if that was a new one"

TIMED = {name: PRESETS[name] for name in ("paper", "residual")}
"""Presets with timed training. `best` reads prompts, which synthetic memories lack; `private` has a separate loop."""

GENERATING = (*TIMED, "best")
"""Presets with timed generation."""


def open_plm(options: Options) -> LocalPLM:
    """Open the PLM on its device: from its folder, or with random weights in bfloat16 where that is fast."""
    if options.plm not in SHAPES:
        return LocalPLM.load(options.plm, device_map=None if options.device == "cpu" else options.device)
    shape, device = SHAPES[options.plm], torch.device(options.device)
    torch.manual_seed(options.seed)
    dtype = torch.bfloat16 if has_bfloat16(device) else torch.float32
    model = opt(shape, device, layers=shape.layers, dtype=dtype)
    return LocalPLM(model.eval(), word_tokenizer(shape.V), name=shape.name)


def task(options: Options) -> Task:
    """Return the task of the corpus."""
    return get_task("data-to-text" if options.corpus == RESTAURANTS else "translation")


def examples(options: Options) -> list[Example]:
    """Return the first examples of the corpus, or synthetic ones."""
    if options.corpus == NONE:
        draw = random.Random(options.seed)
        sentences = [
            " ".join(draw.choices(WORDS.split(), k=draw.randint(2, options.words))) for _ in range(2 * options.examples)
        ]
        return [Example(*pair) for pair in zip(sentences[::2], sentences[1::2], strict=True)]
    if options.corpus == RESTAURANTS:
        return list(restaurant_data().train[: options.examples])
    demo = Path(str(resources.files("pema"))) / "demo_data" / "support_train.tsv"
    return read_examples(data=demo if options.corpus == DEMO else options.corpus, limit=options.examples)


def requested(tokens: Tokens) -> tuple[list[list[int]], list[int]]:
    """Return prompt and target of each example, and the length of each prompt, as `represent` takes them."""
    count = len(tokens.cuts)
    return [tokens.sequence(i) for i in range(count)], [len(tokens.prompt(i)) for i in range(count)]


def plm_memory(options: Options, folder: Path, plm: LocalPLM | None = None) -> Memory:
    """Return the memory of the corpus in `teacher` mode, built on first use."""
    path = folder / "memory"
    if not path.exists():
        build_memory(plm or open_plm(options), examples(options), task(options), path)
    return Memory.open(path)


def synthetic_memory(
    options: Options, shape: Shape, folder: Path, *, stored: torch.dtype = torch.float32, to_learn: bool = True
) -> Memory:
    """Return a synthetic memory for a head of `shape`, written on first use.

    f = U s g with g from N(0, 1), s falling as 1 / sqrt(1 + i) and U a random rotation, as the spectrum of a PLM's
    representations falls; W_hd from N(0, 1 / d); targets drawn from softmax(4 W_hd f), float16 storage.

    Args:
        options: how many pairs, and the seed.
        shape: d and V.
        folder: where the memory is written.
        stored: type of W_hd on the disk.
        to_learn: without it, or at a V above `MOST_TO_LEARN`, the targets are drawn evenly from all V, which takes far
            less time.
    """
    path = folder / f"synthetic-{shape.d}-{shape.V}"
    if path.exists():
        return Memory.open(path)
    to_learn &= shape.V <= MOST_TO_LEARN
    draw = torch.Generator().manual_seed(options.seed)
    head = Head((torch.randn(shape.V, shape.d, generator=draw) * shape.d**-0.5).to(stored))
    head.save(path / HEAD)
    described = PLMDescription(
        name=shape.name,
        architecture="none",
        fingerprint="synthetic",
        tokenizer_fingerprint="synthetic",
        head_fingerprint=head.fingerprint,
        d=shape.d,
        d_tap=shape.d,
        vocabulary_size=shape.V,
        tap="head_input",
        max_length=PAIRS_PER_EXAMPLE,
        eos_token_ids=(0,),
        parameters=shape.V * shape.d,
    )
    translation, count = get_task("translation"), -(-options.pairs // PAIRS_PER_EXAMPLE)
    manifest = Manifest(
        plm=described,
        task=translation.name,
        template=translation.template.text,
        contexts="teacher",
        targets="position",
        dtype="float16",
        inputs=(Input(hashlib.sha256(b"synthetic").hexdigest(), count, PAIRS_PER_SHARD // PAIRS_PER_EXAMPLE),),
    )
    files = sorted(file for file in (path / HEAD).rglob("*") if file.is_file())
    manifest = replace(manifest, head=tuple(FileEntry.of(path, file.relative_to(path).as_posix()) for file in files))
    U = torch.linalg.qr(torch.randn(shape.d, shape.d, generator=draw)).Q * (1 + torch.arange(shape.d)) ** -0.5
    U *= shape.d**0.5 / U.norm()
    for start in range(0, count, PAIRS_PER_SHARD // PAIRS_PER_EXAMPLE):
        here = min(PAIRS_PER_SHARD // PAIRS_PER_EXAMPLE, count - start)
        drawn = _draw(head, U, here, draw, to_learn)
        manifest = manifest.add(write_shard(path, len(manifest.shards), drawn))
    manifest.write(path)
    return Memory.open(path)


def _draw(head: Head, U: Tensor, count: int, draw: torch.Generator, to_learn: bool) -> Contents:
    n = count * PAIRS_PER_EXAMPLE
    f = torch.randn(n, U.shape[1], generator=draw) @ U.T
    if to_learn:
        parts = torch.split(f, 512)
        drawn = [torch.multinomial(torch.softmax(4 * head.logits(rows), -1), 1, generator=draw) for rows in parts]
        targets = torch.cat(drawn)[:, 0]
    else:
        targets = torch.randint(head.vocabulary_size, (n,), generator=draw)
    return Contents(
        representations=f.half(),
        scales=None,
        targets=targets.int(),
        example_offsets=torch.arange(count + 1) * PAIRS_PER_EXAMPLE,
        source_lengths=torch.full((count,), PAIRS_PER_EXAMPLE, dtype=torch.int32),
    )


def random_adapter(preset: str, d: int, vocabulary_size: int, seed: int = 0) -> Adapter:
    """Return an adapter of a preset's shape with random weights, so that it has an effect."""
    config = PRESETS[preset].fitted(d)
    shape = AdapterConfig(
        d,
        vocabulary_size,
        config.rank,
        residual=config.residual,
        activation=config.activation,
        copy_width=config.copy_width,
    )
    adapter = Adapter(shape, seed=seed).requires_grad_(False)
    torch.nn.init.normal_(adapter.B_pd, std=0.02, generator=torch.Generator().manual_seed(seed))
    return adapter


def rows_of(view: View, batch_size: int = 8192) -> Tensor:
    """Return all representations of a view, (pairs, d) float32."""
    return torch.cat([batch.representations for batch in view.batches(batch_size)])
