"""Synthetic memories: random representations, and targets drawn from them by a hidden rule."""

import hashlib
from pathlib import Path

import numpy as np
import torch

from pema.memory.manifest import HEAD, FileEntry, Input, Manifest
from pema.memory.reader import Memory
from pema.memory.shard import Contents, StoredPrompts, write_shard
from pema.owner.bundle import NormSettings
from pema.owner.contract import PLMDescription
from pema.owner.head import Head, Norm


def describe(head, *, name="made", d=None, **changes):
    values = {
        "name": name,
        "architecture": "MadeLM",
        "fingerprint": hashlib.sha256(name.encode()).hexdigest(),
        "tokenizer_fingerprint": "t" * 64,
        "head_fingerprint": head.fingerprint,
        "d": d or head.d,
        "d_tap": head.d_tap,
        "vocabulary_size": head.vocabulary_size,
        "tap": "head_input",
        "max_length": 64,
        "eos_token_ids": (2,),
        "parameters": 1000,
    }
    return PLMDescription(**values | changes)


def make_head(d=12, V=40, *, seed=0, bias=False, scale=1.0, soft_cap=None):
    random = torch.Generator().manual_seed(seed)
    weight = torch.randn(V, d, generator=random) * d**-0.5
    return Head(weight, torch.randn(V, generator=random) if bias else None, scale=scale, soft_cap=soft_cap)


def make_memory(
    path,
    *,
    examples=40,
    d=12,
    V=40,
    seed=0,
    dtype="float32",
    nan_at=None,
    head=None,
    directions=None,
    used=None,
    tap="head_input",
    prompts=False,
):
    """`examples` of 1 to 12 pairs in shards of 16 examples.

    `prompts`: with prompts "1 8 <six tokens> 9", from which the targets are copied in order, each third one spelled as
    another token.

    `directions`: rank of the representations (d where None). `used`: only the first so many tokens are targets.
    """
    path = Path(path)
    random = torch.Generator().manual_seed(seed)
    head = head or make_head(d, V)
    if tap == "norm_input":
        head = Head(head.weight, norm=Norm(NormSettings("rms", 1e-6), None, None))
    basis = torch.randn(d, directions or d, generator=random) * torch.linspace(2, 0.2, directions or d)
    rule = torch.randn(used or V, d, generator=random)
    path.mkdir(parents=True)
    head.save(path / HEAD)
    entries = tuple(FileEntry.of(path, f"{HEAD}/{file.name}") for file in sorted((path / HEAD).iterdir()))
    manifest = Manifest(
        plm=describe(head, tap=tap),
        task="translation",
        template="Say {source}:",
        contexts="teacher",
        targets="position",
        dtype=dtype,
        inputs=(Input("0" * 64, examples, 16),),
        head=entries,
    )
    lengths = torch.randint(1, 13, (examples,), generator=random)
    for k, part in enumerate(lengths.split(16)):
        f = torch.randn(int(part.sum()), directions or d, generator=random) @ basis.T
        targets = (f @ rule.T).argmax(1).int()
        stored_prompts = make_prompts(part, V, random) if prompts else None
        if stored_prompts is not None:
            targets = copies(stored_prompts, part)
        if nan_at is not None and k == 0:
            f[nan_at, 0] = torch.nan
        offsets = torch.cat([torch.zeros(1, dtype=torch.int64), part.cumsum(0)])
        stored = f.to(getattr(torch, dtype))
        contents = Contents(stored, None, targets, offsets, part.int(), prompts=stored_prompts)
        manifest = manifest.add(write_shard(path, k, contents))
    manifest.write(path)
    return Memory.open(path)


def make_prompts(lengths, V, random):
    """Prompts of random tokens from 10 on; the spelling of token x is x + 1, for the tokens that 3 divides."""
    tokens = torch.randint(10, V - 1, (len(lengths), 9), generator=random)
    tokens[:, 0], tokens[:, 1], tokens[:, -1] = 1, 8, 9
    flat = tokens.flatten().numpy().astype(np.int32)
    spelled = (flat >= 10) & (flat % 3 == 0)
    offsets = np.arange(len(lengths) + 1, dtype=np.int64) * 9
    return StoredPrompts(
        flat, np.where(spelled, flat + 1, -1).astype(np.int32), spelled.astype(np.uint8), offsets, None
    )


def copies(prompts, lengths):
    """The targets of prompts: their six tokens in order, spelled where they have a spelling, over and over."""
    words = np.where(prompts.spans > 0, prompts.spellings, prompts.tokens).reshape(-1, 9)[:, 2:8]
    return torch.from_numpy(np.concatenate([np.resize(row, n) for row, n in zip(words, lengths.tolist(), strict=True)]))


def rows(view):
    """All representations and targets of a view, in stored order."""
    batches = list(view.batches(1000))
    return torch.cat([b.representations for b in batches]), torch.cat([b.targets for b in batches])
