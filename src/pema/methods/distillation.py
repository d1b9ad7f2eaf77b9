"""Distillation of the middle layers of a PLM into those of its emulator, at the PLM owner."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from pema.adapter.optimisation import course, descend
from pema.console import progress
from pema.errors import AdapterError
from pema.generation.decoding import token_limit
from pema.memory.encoding import Tokens
from pema.methods.contract import Job
from pema.methods.emulator import Plan, layers_of
from pema.methods.fine_tuning import CLIP
from pema.methods.targets import target_logits
from pema.owner.local import LocalPLM
from pema.owner.probing import hooked

BATCH = 16
WARMUP = 0.1
HIDDEN_WEIGHT = 30.0
"""Weight of the distance between hidden states, relative to the language modelling loss, as in the authors' scripts."""


def distil(plm: LocalPLM, emulator: PreTrainedModel, plan: Plan, job: Job, steps: int, learning_rate: float) -> None:
    """Train E* to match the hidden states of E and to predict the tokens that the PLM generates.

    The texts are those that the PLM generates from the prompts of the training examples; their targets are not read.
    Both models have the same first layers, so E and E* have the same input. The loss is that of the authors' scripts:
    cross-entropy, plus the squared distance between the outputs of E* and E divided by the squared norm of the latter.

    Args:
        plm: the PLM, which stays unchanged.
        emulator: a `shortened` twin of its model; its middle layers are trained.
        plan: the layers of the emulator.
        job: provides the task and the training sources.
        steps: number of AdamW steps, with `BATCH` texts each.
        learning_rate: peak learning rate; the schedule is `pema.adapter.optimisation.course`.

    Raises:
        AdapterError: distillation diverged.
    """
    tokens = _generated(plm, job)
    parameters = [p for layer in layers_of(emulator)[plan.adapters : -plan.adapters] for p in layer.parameters()]
    for parameter in parameters:
        # The twin shares its memory with the PLM, so the trained weights need a copy.
        parameter.data = parameter.data.clone()
        parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.0, fused=True)
    random = np.random.default_rng(0)
    ends = [layers_of(model)[-plan.adapters] for model in (plm.model, emulator)]
    with progress("distilling", steps, "steps") as advance:
        for step in range(steps):
            rate = learning_rate * course((step + 0.5) / steps, WARMUP)
            batch = random.choice(len(tokens.cuts), min(BATCH, len(tokens.cuts)), replace=False).tolist()
            seen: list[Any] = []
            with hooked(*(_input_of(layer, seen) for layer in ends)):
                with torch.no_grad():
                    target_logits(plm.model, tokens, batch)
                logits, targets = target_logits(emulator, tokens, batch)
            lengths = torch.from_numpy(tokens.starts[1:] - tokens.starts[:-1])[batch]
            real = torch.arange(int(lengths.max())) < lengths[:, None]
            teacher, student = (hidden[real.to(hidden.device)].float() for hidden in seen)
            distance = (teacher - student).square().mean() / teacher.square().mean()
            loss = functional.cross_entropy(logits.float(), targets) + HIDDEN_WEIGHT * distance
            if not torch.isfinite(loss):
                raise AdapterError(
                    f"offsite: the distillation loss is {float(loss.detach())} at step {step + 1}: distillation "
                    f"diverged. Lower distil_learning_rate (now {learning_rate:g})."
                )
            descend(optimizer, loss, parameters, rate, CLIP)
            advance(1, note=f"distance {float(distance.detach()):.3f}")
    for parameter in parameters:
        parameter.requires_grad_(False)


def _input_of(layer: nn.Module, seen: list[Any]) -> RemovableHandle:
    """Register a hook that records the input hidden states of a layer."""

    def hook(_module: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        seen.append(given[0] if given else named["hidden_states"])

    return layer.register_forward_pre_hook(hook, with_kwargs=True)


def _generated(plm: LocalPLM, job: Job) -> Tokens:
    """Return the prompts of the training examples, each followed by the PLM's greedy output instead of its target."""
    prompts = job.task.template.encode_prompts(plm.tokenizer, job.train)
    texts = [encoded.prompt for encoded in prompts]
    steps = [token_limit(i, each, plm.max_length, None) for i, each in enumerate(prompts, 1)]
    outputs: dict[int, list[int]] = {}
    for represented in plm.predict(texts, steps):
        assert represented.generated is not None
        outputs[represented.index] = represented.generated.tolist()
    rows = [[*text, *outputs[i]] for i, text in enumerate(texts)]
    starts = np.cumsum([0, *map(len, rows)])
    cuts = starts[:-1] + [len(text) for text in texts]
    lengths = np.array([each.source_length for each in prompts])
    return Tokens(np.concatenate([np.array(row, np.int32) for row in rows]), starts, cuts, lengths)
