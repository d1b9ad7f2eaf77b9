"""Named settings of training: the paper's, the best, without copying, and with differential privacy."""

from __future__ import annotations

import dataclasses
from typing import Any

from pema.adapter.config import TrainConfig
from pema.errors import ConfigError
from pema.schema import among, known

_RESIDUAL = TrainConfig(
    rank=2048,
    kappa=0.0,
    dropout=0.25,
    residual=True,
    activation="gelu",
    optimizer="adamw",
    learning_rate=3e-4,
    weight_decay=0.01,
    warmup=0.05,
    decay="cosine",
    epochs=12,
    least_steps=50,
    vocabulary="auto",
    fit_rank=True,
)

PRIVATE = "private"

PRESETS: dict[str, TrainConfig] = {
    "paper": TrainConfig(fit_rank=True, clip=0.0),
    "best": dataclasses.replace(_RESIDUAL, copy_width=256, copy_least=0.2),
    "residual": _RESIDUAL,
    PRIVATE: dataclasses.replace(
        _RESIDUAL,
        rank=64,
        vocabulary="full",
        dropout=0.0,
        learning_rate=1e-2,
        weight_decay=0.0,
        clip=1.0,
        epochs=8,
        batch_size=128,
        least_steps=0,
        dev_fraction=0.0,
        fit_rank=False,
    ),
}
"""Presets by name.

`residual` is `best` without copying from the prompt. `private` is `residual` adapted to DP-SGD; see
docs/private-training.md for how it was chosen.
"""


def preset(name: str, **changes: Any) -> TrainConfig:  # noqa: ANN401
    """Return the preset `name` with `changes`; a rank or batch size among them is used unchanged.

    With `dp_epsilon`, `best` means `private`.

    Args:
        name: `paper`, `best`, `residual` or `private`; the last one needs `dp_epsilon` and `dp_delta`.
        changes: fields of `TrainConfig`.

    Raises:
        ConfigError: the preset or a setting is unknown, or settings contradict each other.
    """
    among("preset", [name], PRESETS)
    known(TrainConfig, changes)
    epsilon = changes.get("dp_epsilon")
    if name == PRIVATE and epsilon is None:
        raise ConfigError("preset 'private' trains with DP-SGD: give dp_epsilon and dp_delta, or choose preset 'best'.")
    if name == "best" and epsilon is not None:
        name = PRIVATE
    if "rank" in changes:
        changes = {"fit_rank": False} | changes
    if "batch_size" in changes:
        changes = {"least_steps": 0} | changes
    return dataclasses.replace(PRESETS[name], **changes)
