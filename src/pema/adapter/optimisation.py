"""What every training of an adapter sets up alike: device, optimizer, learning rate, and the config of its adapter."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from pema.adapter.config import AdapterConfig, TrainConfig
from pema.adapter.schedule import Fitted
from pema.errors import AdapterError
from pema.memory.reader import Memory


def learning_rate_at(step: int, steps: int, config: TrainConfig) -> float:
    """The learning rate of step 0, 1, ... of `steps`: a linear rise over the warm-up, then the decay towards zero."""
    warmup = math.ceil(config.warmup * steps)
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    done = (step - warmup) / max(steps - warmup, 1)
    factor = {"none": 1.0, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}[config.decay]
    return config.learning_rate * factor


def make_optimizer(parameters: Iterable[nn.Parameter], config: TrainConfig) -> torch.optim.Optimizer:
    """Adam or AdamW, as the settings say."""
    kind = torch.optim.AdamW if config.optimizer == "adamw" else torch.optim.Adam
    return kind(parameters, lr=config.learning_rate, weight_decay=config.weight_decay, fused=True)


def device_named(name: str) -> torch.device:
    """The device that a user names.

    Raises:
        AdapterError: it cannot be used here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise AdapterError(f"device={name!r} cannot be used here: {error}. Use device='auto'.") from error
    return device


def adapter_config(
    memory: Memory, config: TrainConfig, training: dict[str, Any] | None = None, fitted: Fitted | None = None
) -> AdapterConfig:
    """Describe the adapter that `config` trains on `memory`.

    Args:
        memory: the external memory.
        config: the settings.
        training: what the adapter tells of its training.
        fitted: the schedule that was fitted to the held-out pairs.
    """
    manifest = memory.manifest
    return AdapterConfig(
        d=memory.d,
        vocabulary_size=manifest.plm.vocabulary_size,
        rank=config.rank,
        residual=config.residual,
        activation=config.activation,
        vocabulary=config.vocabulary,
        plm=manifest.plm,
        task=manifest.task,
        template=manifest.template,
        contexts=manifest.contexts,
        fitted=fitted,
        training=training or {},
    )
