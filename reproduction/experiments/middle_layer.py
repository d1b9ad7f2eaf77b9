"""Upper bound: adapters that read a middle layer of the PLM as well, which an owner would have to hand out.

    python -m reproduction.experiments.middle_layer DATA PLM -o runs/middle-layer

DATA is the folder of `python -m reproduction.data.real`; PLM is a causal language model in the process, such as
SmolLM2-135M-Instruct. Preset `best` is trained on the 1,000 texts of WebNLG, by whole texts, alone and with an addition
to h_pd that reads hidden states: a hidden layer over the state of the same position, or a causal transformer layer over
the states of all positions of prompt and text. The addition starts at zero. Held out are the 50 dev texts of the
comparison; each figure is that of the best epoch. Results go to `reproduction/results/middle_layer.jsonl`; finished
ones are kept.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, rms_norm, scaled_dot_product_attention

from pema.adapter.config import TrainConfig
from pema.adapter.dropout import Dropout
from pema.adapter.loss import CrossEntropy, JointLoss
from pema.adapter.module import Adapter
from pema.adapter.optimisation import adapter_config, descend, learning_rate_at, make_optimizer
from pema.adapter.presets import preset
from pema.adapter.sampled import SampledCrossEntropy
from pema.memory.build import build_memory
from pema.memory.reader import Memory
from pema.owner.opening import open_plm
from pema.signature import signature
from pema.tasks.readers import read_examples
from pema.tasks.registry import Task
from pema.tasks.template import Template
from reproduction.lines import put_run, read_runs
from reproduction.tables.middle_layer import FILE, KINDS

DATA = "webnlg-seen"
TASK = Task("facts", Template("Say these facts in one or two sentences: \n{source}\nText:"), ("bleu",), "")
SEED, TEXTS, EPOCHS, DROPOUT = 0, 16, 8, 0.3


@dataclass(frozen=True)
class Text:
    """One example: its n pairs, and hidden states of the s tokens of its prompt and text.

    Attributes:
        rows: (n,) int64, places of the pairs in the memory.
        f: (n, d) float32.
        targets: (n,) int64.
        states: hidden states (s, d) by layer; those of the pairs are the last n.
    """

    rows: Tensor
    f: Tensor
    targets: Tensor
    states: dict[int, Tensor]


@torch.no_grad()
def texts(model: nn.Module, memory: Memory, layers: Sequence[int]) -> list[Text]:
    """Read a memory by whole examples, and compute the hidden states of their contexts."""
    batches = list(memory.view().batches(1 << 14))
    rows = torch.cat([batch.rows for batch in batches])
    order = rows.argsort()
    rows, f, targets, steps = (
        torch.cat([getattr(batch, name) for batch in batches])[order]
        for name in ("rows", "representations", "targets", "steps")
    )
    starts = (steps == 0).nonzero()[:, 0].tolist()
    found = []
    for first, end in zip(starts, [*starts[1:], len(rows)], strict=True):
        prompt = memory.prompts.at(rows[first : first + 1], (0, 0)).prompt[0]
        tokens = torch.cat((prompt, targets[first : end - 1]))
        hidden = model(input_ids=tokens[None], output_hidden_states=True).hidden_states
        states = {layer: hidden[layer][0].bfloat16() for layer in layers}
        found.append(Text(rows[first:end], f[first:end], targets[first:end], states))
    return found


class SamePosition(nn.Module):
    """A hidden layer of `width` over the hidden state of each context; zero at first."""

    def __init__(self, d: int, width: int = 384) -> None:
        super().__init__()
        self.read, self.write = nn.Linear(d, width), nn.Linear(width, d, bias=False)
        self.dropout = nn.Dropout(DROPOUT)
        nn.init.zeros_(self.write.weight)

    def forward(self, states: Sequence[Tensor], pairs: Sequence[int]) -> Tensor:
        """Return an addition to h_pd, (n, d) for the last `pairs` positions of each text."""
        x = torch.cat([each[-n:] for each, n in zip(states, pairs, strict=True)]).float()
        hidden = gelu(self.read(self.dropout(rms_norm(x, x.shape[-1:]))))
        written: Tensor = self.write(self.dropout(hidden))
        return written


class AllPositions(nn.Module):
    """A causal transformer layer of `width` over the hidden states of all positions; zero at first."""

    def __init__(self, d: int, width: int = 256, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.read, self.write = nn.Linear(d, width, bias=False), nn.Linear(width, d, bias=False)
        self.qkv, self.mix = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.dropout = nn.Dropout(DROPOUT)
        nn.init.zeros_(self.write.weight)

    def forward(self, states: Sequence[Tensor], pairs: Sequence[int]) -> Tensor:
        """Return an addition to h_pd, (n, d) for the last `pairs` positions of each text."""
        padded = nn.utils.rnn.pad_sequence([each.float() for each in states], batch_first=True)
        x = self.read(self.dropout(rms_norm(padded, padded.shape[-1:])))
        b, s, width = x.shape
        shape = (b, s, 3, self.heads, width // self.heads)
        q, k, v = self.qkv(rms_norm(x, (width,))).view(shape).permute(2, 0, 3, 1, 4)
        q, k = (rotated(rms_norm(each, each.shape[-1:])) for each in (q, k))
        # Padding follows each text, where no causal position sees it.
        heads = scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.dropout(self.mix(heads.transpose(1, 2).reshape(b, s, width)))
        x = x + self.dropout(self.down(gelu(self.up(rms_norm(x, (width,))))))
        last = [x[i, len(each) - n : len(each)] for i, (each, n) in enumerate(zip(states, pairs, strict=True))]
        written: Tensor = self.write(rms_norm(torch.cat(last), (width,)))
        return written


def rotated(x: Tensor) -> Tensor:
    """Return queries or keys (b, h, s, c) with rotary position embeddings."""
    s, c = x.shape[-2:]
    angles = torch.arange(s)[:, None] * (10000.0 ** (-torch.arange(0, c, 2) / c))
    real, imaginary = x[..., ::2], x[..., 1::2]
    cos, sin = angles.cos(), angles.sin()
    return torch.stack((real * cos - imaginary * sin, real * sin + imaginary * cos), -1).flatten(-2)


class Training:
    """Training of preset `best` with an addition to h_pd, by whole texts."""

    def __init__(self, memory: Memory, held_out: Memory, config: TrainConfig, more: nn.Module | None) -> None:
        self.memory, self.held_out, self.config, self.more = memory, held_out, config, more
        self.adapter = Adapter(adapter_config(memory, config), None, seed=config.seed)
        self.parameters = [*self.adapter.parameters(), *(more.parameters() if more else ())]
        added: list[dict[str, Any]] = [{"params": list(more.parameters()), "relative": 1.0}] if more else []
        self.optimizer = make_optimizer([*self.adapter.groups(), *added], config)
        self.head = memory.head(torch.bfloat16)
        seen = memory.view().targets_seen()
        self.sampled = SampledCrossEntropy(self.head, seen, config.seed, bfloat16=True)
        self.exact = CrossEntropy(self.head, None, bfloat16=True)
        self.dropout = Dropout(config.dropout, config.seed, torch.device("cpu"))

    def loss(self, batch: Sequence[Text], layer: int, step: int | None) -> Tensor:
        """Return the loss of a step of the training, or of held-out texts if there is no step."""
        memory = self.held_out if step is None else self.memory
        f, targets, rows = (torch.cat([getattr(t, name) for t in batch]) for name in ("f", "targets", "rows"))
        drop = None if step is None else self.dropout.at(step)
        entropy = self.exact if step is None else self.sampled.at(step)
        with torch.autocast("cpu", torch.bfloat16):
            h = self.adapter.predict(f, self.adapter.compress(f, drop))
            if self.more is not None:
                added = self.more([t.states[layer] for t in batch], [len(t.rows) for t in batch])
                h = h + added.float() * f.square().mean().sqrt()
            context = memory.prompts.at(rows, self.adapter.config.frame)
            copied = self.adapter.copy(f, context, self.head.weight, drop)
        joint = JointLoss(entropy, kappa=0.0, W_hd=self.head.weight)
        if copied is not None:
            return joint.with_copies(copied, h, targets, forced=step is not None)
        return entropy(h, targets)

    @torch.no_grad()
    def measure(self, data: Sequence[Text], layer: int) -> float:
        """Return the mean cross-entropy of held-out pairs in nats."""
        self.switch(training=False)
        total = sum(float(self.loss([text], layer, None)) * len(text.rows) for text in data)
        self.switch(training=True)
        return total / sum(len(text.rows) for text in data)

    def switch(self, *, training: bool) -> None:
        """Turn dropout on or off."""
        for module in (self.adapter, self.more):
            if module is not None:
                module.train(training)

    def run(self, data: Sequence[Text], held_out: Sequence[Text], layer: int) -> list[float]:
        """Train, and return the held-out cross-entropy of each epoch."""
        random = torch.Generator().manual_seed(self.config.seed)
        per_epoch = math.ceil(len(data) / TEXTS)
        step, losses = 0, []
        for _ in range(self.config.epochs):
            order = torch.randperm(len(data), generator=random).tolist()
            for first in range(0, len(data), TEXTS):
                loss = self.loss([data[i] for i in order[first : first + TEXTS]], layer, step)
                rate = learning_rate_at(step, self.config.epochs * per_epoch, self.config)
                descend(self.optimizer, loss, self.parameters, rate, self.config.clip)
                step += 1
            losses.append(round(self.measure(held_out, layer), 4))
        return losses


def measured(memory: Memory, dev: Memory, data: dict[str, list[Text]], kind: str, layer: int) -> dict[str, Any]:
    """Train one kind of adapter and return its figures."""
    torch.manual_seed(SEED)
    more = {"same position": SamePosition, "all positions": AllPositions}.get(kind)
    config = preset("best", epochs=EPOCHS, vocabulary="sampled", seed=SEED)
    training = Training(memory, dev, config, None if more is None else more(memory.d))
    started = time.process_time()
    losses = training.run(data["train"], data["dev"], layer)
    return {
        "layer": layer,
        "held_out_cross_entropy": min(losses),
        "by_epoch": losses,
        "parameters": sum(p.numel() for p in training.parameters),
        "processor_seconds": round(time.process_time() - started, 1),
    }


def main() -> None:
    """Run the missing experiments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("plm")
    parser.add_argument("-o", "--output", type=Path, default=Path("runs/middle-layer"), help="memories")
    args = parser.parse_args()
    plm = open_plm(args.plm, dtype="bfloat16")
    memories = {
        part: build_memory(
            plm, read_examples(data=args.data / DATA / f"{part}.jsonl"), TASK, args.output / part, contexts="teacher"
        )
        for part in ("train", "dev")
    }
    model = plm.generator.model
    layers = sorted({layer for _, layer in KINDS.values()})
    data = {part: texts(model, memory, layers) for part, memory in memories.items()}
    for name, (kind, layer) in KINDS.items():
        if name not in read_runs(FILE):
            figures = measured(memories["train"], memories["dev"], data, kind, layer)
            settings = {"kind": kind, "layer": layer, "preset": "best", "plm": plm.description.name, "data": DATA}
            put_run(FILE, name, {**figures, "signature": signature(settings, SEED)})


if __name__ == "__main__":
    main()
