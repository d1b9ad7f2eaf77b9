"""Plug-in External Memory Adaptation (PEMA; Kim, Kim and Bak, NAACL 2024) for frozen language models.

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
    from pema.adapter.schedule import Constant, Fitted, GradualUnrolling, Linear, NoAdapter
    from pema.adapter.training import train
    from pema.evaluation.evaluate import evaluate
    from pema.generation.decoding import generate
    from pema.generation.plugin import attach
    from pema.memory.build import build_memory
    from pema.memory.reader import Memory
    from pema.owner.client.remote import RemotePLM
    from pema.owner.local import LocalPLM
    from pema.owner.opening import open_plm
    from pema.tasks.example import Example
    from pema.tasks.readers import from_dataset, read_examples, read_lines
    from pema.tasks.registry import get_task

__version__ = "0.1.0"

_HOMES = {
    "Adapter": "adapter.module",
    "Constant": "adapter.schedule",
    "Example": "tasks.example",
    "Fitted": "adapter.schedule",
    "GradualUnrolling": "adapter.schedule",
    "Linear": "adapter.schedule",
    "LocalPLM": "owner.local",
    "Memory": "memory.reader",
    "NoAdapter": "adapter.schedule",
    "RemotePLM": "owner.client.remote",
    "TrainConfig": "adapter.config",
    "attach": "generation.plugin",
    "build_memory": "memory.build",
    "evaluate": "evaluation.evaluate",
    "fit_schedule": "adapter.fitted",
    "from_dataset": "tasks.readers",
    "generate": "generation.decoding",
    "get_task": "tasks.registry",
    "open_plm": "owner.opening",
    "preset": "adapter.presets",
    "read_examples": "tasks.readers",
    "read_lines": "tasks.readers",
    "train": "adapter.training",
}

__all__ = [
    "Adapter",
    "Constant",
    "Example",
    "Fitted",
    "GradualUnrolling",
    "Linear",
    "LocalPLM",
    "Memory",
    "NoAdapter",
    "RemotePLM",
    "TrainConfig",
    "attach",
    "build_memory",
    "evaluate",
    "fit_schedule",
    "from_dataset",
    "generate",
    "get_task",
    "open_plm",
    "preset",
    "read_examples",
    "read_lines",
    "train",
]


def __getattr__(name: str) -> Any:  # noqa: ANN401
    if name not in _HOMES:
        raise AttributeError(f"module 'pema' has no attribute {name!r}")
    return getattr(importlib.import_module(f"pema.{_HOMES[name]}"), name)
