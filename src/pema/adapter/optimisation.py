"""Common parts of every training: optimizer, learning rate, step, early stopping, and the config of the adapter."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pema.adapter.config import AdapterConfig, Decay, TrainConfig
from pema.adapter.schedule import Fitted, suited
from pema.devices import has_bfloat16
from pema.memory.reader import Memory
from pema.processes import ALONE, Processes


def course(done: float, warmup: float, decay: Decay = "cosine") -> float:
    """Return the learning rate relative to its peak: a linear rise over the warm-up, then the decay towards zero.

    Args:
        done: finished share of the training; beyond 1 the rate stays constant.
        warmup: share of the warm-up.
        decay: form of the decay.
    """
    if warmup and done <= warmup:
        return done / warmup
    fallen = min((done - warmup) / (1 - warmup), 1.0)
    return {"none": 1.0, "linear": 1 - fallen, "cosine": (1 + math.cos(math.pi * fallen)) / 2}[decay]


def learning_rate_at(step: int, steps: int, config: TrainConfig) -> float:
    """Return the learning rate of a step (from 0): the warm-up has whole steps, and no step has a rate of zero."""
    warmup = math.ceil(config.warmup * steps)
    done = (step + 1 if step < warmup else step) / steps
    return config.learning_rate * course(done, warmup / steps, config.decay)


def descend(
    optimizer: torch.optim.Optimizer,
    loss: Tensor | None,
    parameters: Iterable[nn.Parameter],
    rate: float,
    clip: float,
    *,
    share: float = 1.0,
    processes: Processes = ALONE,
) -> None:
    """Take an optimizer step on a loss, with a learning rate; for the rest see `step_down`."""
    set_rate(optimizer, rate)
    step_down(optimizer, loss, parameters, clip, share=share, processes=processes)


def step_down(
    optimizer: torch.optim.Optimizer,
    loss: Tensor | None,
    parameters: Iterable[nn.Parameter],
    clip: float,
    *,
    share: float = 1.0,
    processes: Processes = ALONE,
) -> None:
    """Take an optimizer step on a loss, with the gradient's norm at most `clip`.

    Args:
        optimizer: optimizer of the parameters.
        loss: scalar loss, the mean over this process's part of the batch; None if that is empty.
        parameters: trained parameters.
        clip: maximum norm of the gradient; 0: no clipping.
        share: share of the batch's pairs in this process's part.
        processes: the processes with the other parts, which take the same step.
    """
    parameters = list(parameters)
    optimizer.zero_grad(set_to_none=True)
    if loss is not None:
        (loss if processes.count == 1 else loss * share).backward()  # type: ignore[no-untyped-call]
    add_gradients(parameters, processes)
    if clip:
        nn.utils.clip_grad_norm_(parameters, clip)
    optimizer.step()


def add_gradients(parameters: Sequence[nn.Parameter], processes: Processes) -> None:
    """Add the gradients of all processes; a parameter that has none in any process keeps none, as in one process."""
    if processes.count == 1:
        return
    exist = [parameter.grad is not None for parameter in parameters]
    parts = [p.new_zeros(p.numel()) if p.grad is None else p.grad.flatten() for p in parameters]
    flat = processes.add(torch.cat([*parts, parameters[0].new_tensor(exist)]))
    if not all(exist):  # else there is no need to wait for the numbers of an accelerator
        exist = [count > 0 for count in flat[-len(exist) :].tolist()]
    sums = torch.split(flat, [*map(len, parts), len(exist)])[:-1]
    for parameter, part, exists in zip(parameters, sums, exist, strict=True):
        parameter.grad = part.view_as(parameter) if exists else None


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the learning rate of an optimizer, and in proportion that of groups with a relative rate."""
    for group in optimizer.param_groups:
        own = rate * group.get("relative", 1.0)
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(own)
        else:
            group["lr"] = own


@dataclass
class EarlyStopping:
    """Detector of a held-out loss that no longer falls.

    Attributes:
        patience: number of measurements without a lower loss after which training stops.
        lowest: lowest loss so far.
        since: number of measurements since then.
    """

    patience: int
    lowest: float = math.inf
    since: int = 0

    def is_lowest(self, loss: float) -> bool:
        """Record a held-out loss; return whether it is the lowest so far."""
        lower = loss < self.lowest
        self.lowest, self.since = (loss, 0) if lower else (self.lowest, self.since + 1)
        return lower

    @property
    def is_over(self) -> bool:
        """Whether training must stop."""
        return self.since >= self.patience


def uses_bfloat16(config: TrainConfig, device: torch.device) -> bool:
    """Return whether matrix products with W_hd are computed in bfloat16."""
    return config.precision == "bfloat16" or (config.precision == "auto" and has_bfloat16(device))


def make_optimizer(
    parameters: Iterable[nn.Parameter] | list[dict[str, Any]], config: TrainConfig, *, captured: bool = False
) -> torch.optim.Optimizer:
    """Create the optimizer of the settings: Adam or AdamW.

    Args:
        parameters: the parameters, or groups of them, whose "relative" rate is a multiple of the learning rate.
        config: the settings.
        captured: whether its steps are captured as a CUDA graph, which reads the learning rate from the device.
    """
    kind = torch.optim.AdamW if config.optimizer == "adamw" else torch.optim.Adam
    rate = config.learning_rate
    optimizer = kind(parameters, lr=rate, weight_decay=config.weight_decay, fused=True, capturable=captured)
    for group in optimizer.param_groups if captured else ():
        group["lr"] = torch.tensor(rate, device=group["params"][0].device)
    return optimizer


def adapter_config(
    memory: Memory, config: TrainConfig, training: dict[str, Any] | None = None, fitted: Fitted | None = None
) -> AdapterConfig:
    """Describe the adapter that `config` trains on `memory`.

    Args:
        memory: the external memory.
        config: the settings.
        training: settings, figures and signature of the training.
        fitted: the schedule fitted to the held-out pairs.
    """
    manifest = memory.manifest
    # Under differential privacy nothing is computed from the targets without noise, not even from their lengths.
    statistics = manifest.statistics if config.dp_epsilon is None else None
    on_policy = any(entry.policy for entry in manifest.inputs)
    return AdapterConfig(
        d=memory.d,
        vocabulary_size=manifest.plm.vocabulary_size,
        rank=config.rank,
        residual=config.residual,
        activation=config.activation,
        vocabulary=config.vocabulary if config.vocabulary in ("seen", "own") else "full",
        copy_width=config.copy_width,
        frame=memory.prompts.frame if config.copy_width else (0, 0),
        plm=manifest.plm,
        task=manifest.task,
        template=manifest.template,
        chat_template=manifest.chat_template,
        system=manifest.system,
        contexts=manifest.contexts,
        schedule=suited(None if on_policy else manifest.contexts),
        fitted=fitted,
        training=training or {},
        max_new_tokens=statistics.max_new_tokens if statistics else None,
        stop=statistics.stop if statistics else (),
    )
