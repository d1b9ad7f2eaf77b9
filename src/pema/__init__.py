"""Plug-in External Memory Adaptation (PEMA; Kim, Kim and Bak, NAACL 2024) for frozen language models.

    plm = pema.PLM.from_pretrained("embedded")
    adapter = plm.adapt(pema.read_examples(source="train.en", target="train.de"), task="translation")
    texts = plm.generate(["Where is your order?"], adapter)

The names below are loaded when they are first used, so that `import pema` is quick.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pema.adapter.config import TrainConfig
    from pema.adapter.fitted import fit_schedule
    from pema.adapter.module import Adapter
    from pema.adapter.presets import preset
    from pema.adapter.ray import train_on_ray
    from pema.adapter.schedule import Constant, Fitted, GradualUnrolling, Linear, NoAdapter, Schedule
    from pema.adapter.training import train
    from pema.api import PLM
    from pema.cluster.opening import replicas
    from pema.errors import (
        AdapterError,
        CapacityError,
        ConfigError,
        DataError,
        ExternalMemoryError,
        MismatchError,
        OwnerError,
        PemaError,
        ProcessError,
        StorageError,
    )
    from pema.evaluation.evaluate import evaluate
    from pema.evaluation.perplexity import perplexity
    from pema.evaluation.tuning import tune
    from pema.generation.classification import classify
    from pema.generation.config import GenerateConfig
    from pema.generation.decoding import generate
    from pema.generation.plugin import attach
    from pema.memory.build import build_memory
    from pema.memory.config import BuildConfig
    from pema.memory.reader import Memory
    from pema.owner.client.remote import RemotePLM
    from pema.owner.config import LoadConfig
    from pema.owner.local import LocalPLM
    from pema.owner.logprobs.recover import recover_head
    from pema.owner.opening import open_plm
    from pema.tasks.demonstrations import demonstrate
    from pema.tasks.example import Example, Turn
    from pema.tasks.readers import read_examples, read_lines
    from pema.tasks.registry import Task, get_task
    from pema.tasks.template import Template

__version__ = "0.2.0"

_HOMES = {
    "adapter.config": ("TrainConfig",),
    "adapter.fitted": ("fit_schedule",),
    "adapter.module": ("Adapter",),
    "adapter.presets": ("preset",),
    "adapter.ray": ("train_on_ray",),
    "adapter.schedule": ("Constant", "Fitted", "GradualUnrolling", "Linear", "NoAdapter", "Schedule"),
    "adapter.training": ("train",),
    "api": ("PLM",),
    "cluster.opening": ("replicas",),
    "errors": (
        *("AdapterError", "CapacityError", "ConfigError", "DataError", "ExternalMemoryError", "MismatchError"),
        *("OwnerError", "PemaError", "ProcessError", "StorageError"),
    ),
    "evaluation.evaluate": ("evaluate",),
    "evaluation.perplexity": ("perplexity",),
    "evaluation.tuning": ("tune",),
    "generation.classification": ("classify",),
    "generation.config": ("GenerateConfig",),
    "generation.decoding": ("generate",),
    "generation.plugin": ("attach",),
    "memory.build": ("build_memory",),
    "memory.config": ("BuildConfig",),
    "memory.reader": ("Memory",),
    "owner.client.remote": ("RemotePLM",),
    "owner.config": ("LoadConfig",),
    "owner.local": ("LocalPLM",),
    "owner.logprobs.recover": ("recover_head",),
    "owner.opening": ("open_plm",),
    "tasks.demonstrations": ("demonstrate",),
    "tasks.example": ("Example", "Turn"),
    "tasks.readers": ("read_examples", "read_lines"),
    "tasks.registry": ("Task", "get_task"),
    "tasks.template": ("Template",),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "PLM",
    "Adapter",
    "AdapterError",
    "BuildConfig",
    "CapacityError",
    "ConfigError",
    "Constant",
    "DataError",
    "Example",
    "ExternalMemoryError",
    "Fitted",
    "GenerateConfig",
    "GradualUnrolling",
    "Linear",
    "LoadConfig",
    "LocalPLM",
    "Memory",
    "MismatchError",
    "NoAdapter",
    "OwnerError",
    "PemaError",
    "ProcessError",
    "RemotePLM",
    "Schedule",
    "StorageError",
    "Task",
    "Template",
    "TrainConfig",
    "Turn",
    "attach",
    "build_memory",
    "classify",
    "demonstrate",
    "evaluate",
    "fit_schedule",
    "generate",
    "get_task",
    "open_plm",
    "perplexity",
    "preset",
    "read_examples",
    "read_lines",
    "recover_head",
    "replicas",
    "train",
    "train_on_ray",
    "tune",
]


def __getattr__(name: str) -> Any:  # noqa: ANN401
    if name not in _HOME_OF:
        raise AttributeError(f"module 'pema' has no attribute {name!r}")
    return getattr(importlib.import_module(f"pema.{_HOME_OF[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
