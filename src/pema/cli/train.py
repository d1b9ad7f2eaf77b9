"""`pema train`: steps 2 and 3, an adapter from a memory. Needs no PLM."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from pema.adapter.config import TrainConfig
from pema.adapter.presets import preset as preset_of
from pema.cli.options import RUNNING, AsJSON, MemoryPlace, PresetName, show
from pema.cli.settings import Options, declared
from pema.cluster.config import EngineConfig
from pema.extras import require_library
from pema.storage.address import is_address, shown

COMMON = (
    *("rank", "kappa", "learning_rate", "epochs", "batch_size", "clip", "vocabulary", "init"),
    *("dp_epsilon", "dp_delta", "seed"),
)
TRAINING = Options(TrainConfig, COMMON, rest=True, defaults=False)


@declared(training=TRAINING, running=RUNNING)
def train(
    memory: MemoryPlace,
    output: Annotated[
        str, typer.Option("-o", "--output", help="Folder for the adapter, or its address.", metavar="ADAPTER")
    ],
    training: dict[str, Any],
    running: dict[str, Any],
    preset: PresetName = "best",
    resume: Annotated[bool, typer.Option("--resume", help="Continue from the checkpoint of a killed run.")] = False,
    tensorboard: Annotated[bool, typer.Option("--tensorboard", help="Also log for TensorBoard.")] = False,
    as_json: AsJSON = False,
) -> None:
    """Train an adapter on an external memory; a laptop is enough.

    `accelerate launch -m pema train ...` trains the same adapter on several devices, `--engine ray` on a cluster.

    With --dp-epsilon and --dp-delta the adapter is differentially private at example level, and no schedule is fitted.

    Example: pema train memory -o adapter --preset best
    """
    from pema.adapter.store import require_free
    from pema.memory.places import read_manifest
    from pema.processes import join

    processes, engine = join(), EngineConfig(**running)
    config = preset_of(preset, **training)
    config.require_libraries()
    if tensorboard:
        require_library("--tensorboard", "tensorboard", "tensorboard")
    read_manifest(memory)
    if not resume and not is_address(output) and processes.is_writer:
        require_free(Path(output))

    from pema.adapter.ray import train_on_ray
    from pema.adapter.training import train as train_adapter
    from pema.console import keeping
    from pema.memory.reader import Memory

    kept = "the cache" if is_address(output) else output
    with keeping(f"the last checkpoint is kept in {kept}: the same command with --resume continues from it"):
        if engine.engine == "ray":
            _, summary = train_on_ray(
                memory,
                config,
                output,
                workers=engine.workers,
                address=engine.address,
                resume=resume,
                tensorboard=tensorboard,
            )
        else:
            _, summary = train_adapter(Memory.open(memory), config, output, resume=resume, tensorboard=tensorboard)
    show({"adapter": shown(output), **summary}, as_json)
