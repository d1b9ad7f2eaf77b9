"""`pema train`: steps 2 and 3, an adapter from a memory. Needs no PLM."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from pema.cli.options import AsJSON, MemoryFolder, Seed, show


class Preset(StrEnum):
    """Named hyper-parameters."""

    paper = "paper"
    best = "best"
    private = "private"


def train(
    memory: MemoryFolder,
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder for the adapter.", metavar="ADAPTER")],
    preset: Annotated[
        Preset, typer.Option("--preset", help="paper: the paper's hyper-parameters; best: ours (docs/presets.md).")
    ] = Preset.best,
    rank: Annotated[int | None, typer.Option("--rank", min=1, help="Rows of A.")] = None,
    kappa: Annotated[float | None, typer.Option("--kappa", min=0, max=1, help="Weight of reconstruction.")] = None,
    learning_rate: Annotated[float | None, typer.Option("--learning-rate", help="Peak learning rate.")] = None,
    epochs: Annotated[int | None, typer.Option("--epochs", min=1, help="Most passes over the memory.")] = None,
    batch_size: Annotated[
        int | None, typer.Option("--batch-size", min=1, help="Pairs in a step; examples with --dp-epsilon.")
    ] = None,
    clip: Annotated[
        float | None, typer.Option("--clip", min=0, help="Largest norm of a gradient; an example's with --dp-epsilon.")
    ] = None,
    vocabulary: Annotated[
        str | None, typer.Option("--vocabulary", help="full, or seen: only tokens that occur in the memory.")
    ] = None,
    init: Annotated[str | None, typer.Option("--init", help="Start of A: random or pca.")] = None,
    dp_epsilon: Annotated[
        float | None,
        typer.Option("--dp-epsilon", min=0, help="Train with DP-SGD: the most epsilon that an example may spend."),
    ] = None,
    dp_delta: Annotated[
        float | None, typer.Option("--dp-delta", min=0, help="Delta of DP-SGD: less than 1 / the number of examples.")
    ] = None,
    seed: Seed = 0,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the checkpoint of a killed run.")] = False,
    tensorboard: Annotated[bool, typer.Option("--tensorboard", help="Also log for TensorBoard.")] = False,
    as_json: AsJSON = False,
) -> None:
    """Train an adapter on an external memory; a laptop is enough.

    With --dp-epsilon and --dp-delta the adapter is differentially private at example level, and no schedule is fitted.

    Example: pema train memory -o adapter --preset best
    """
    from pema.adapter.presets import preset as preset_of
    from pema.adapter.training import train as train_adapter
    from pema.memory.reader import Memory

    given = {
        "rank": rank,
        "kappa": kappa,
        "learning_rate": learning_rate,
        "epochs": epochs,
        "batch_size": batch_size,
        "vocabulary": vocabulary,
        "init": init,
        "clip": clip,
        "dp_epsilon": dp_epsilon,
        "dp_delta": dp_delta,
    }
    changes = {name: value for name, value in given.items() if value is not None}
    config = preset_of(preset.value, seed=seed, **changes)
    opened = Memory.open(memory)
    _, summary = train_adapter(opened, config, output, resume=resume, tensorboard=tensorboard)
    show({"adapter": str(output), **summary}, as_json)
