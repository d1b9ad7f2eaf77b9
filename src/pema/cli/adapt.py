"""`pema adapt`: steps 1 to 3 in one, a memory and an adapter, with on-policy rounds."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from pema.adapter.presets import preset as preset_of
from pema.cli.build import LOADING
from pema.cli.options import (
    AsJSON,
    ChatPrompts,
    PairsData,
    PLMName,
    PresetName,
    SourceColumn,
    SourceLines,
    SystemPrompt,
    TargetColumn,
    TargetLines,
    TaskName,
    TemplateText,
    integer,
    require_plm,
    show,
)
from pema.cli.settings import Options, declared
from pema.cli.train import TRAINING
from pema.memory.config import MOST_ROUNDS, BuildConfig, require_rounds
from pema.storage.address import is_address, joined, shown

BUILDING = Options(BuildConfig, ("contexts", "targets", "dtype", "limit", "batch_tokens"))


@declared(building=BUILDING, training=TRAINING, loaded=LOADING)
def adapt(
    plm: PLMName,
    task: TaskName,
    output: Annotated[
        str,
        typer.Option("-o", "--output", help="Folder for the memory and the adapter, or its address.", metavar="FOLDER"),
    ],
    building: dict[str, Any],
    training: dict[str, Any],
    loaded: dict[str, Any],
    source: SourceLines = None,
    target: TargetLines = None,
    data: PairsData = None,
    source_field: SourceColumn = None,
    target_field: TargetColumn = None,
    template: TemplateText = None,
    chat: ChatPrompts = None,
    system: SystemPrompt = None,
    preset: PresetName = "best",
    rounds: Annotated[
        int,
        integer(
            "--rounds",
            "Further rounds, whose contexts follow the text that an adapter writes (docs/presets.md).",
            least=0,
            most=MOST_ROUNDS,
        ),
    ] = 0,
    as_json: AsJSON = False,
) -> None:
    """Build a memory and train an adapter on it, as `pema build` and `pema train` do; with --rounds several times.

    The same command resumes one that was interrupted.

    Example: pema adapt --plm embedded --task translation --data train.tsv -o adapted
    """
    from pema.console import keeping, note
    from pema.tasks.readers import read
    from pema.tasks.registry import get_task

    build, train = BuildConfig(**building), preset_of(preset, **training)
    require_rounds(rounds, build, train.dp_epsilon)
    train.require_libraries()
    chosen = get_task(task, template, chat=chat, system=system)
    fields = {"source_field": source_field, "target_field": target_field}
    reading = read(data, source=source, target=target, **fields, limit=build.limit)
    note(str(reading))
    require_plm(plm, loaded.get("revision"))

    from pema.generation.rounds import ADAPTER
    from pema.generation.rounds import adapt as adapted
    from pema.owner.opening import open_plm

    kept = "the cache" if is_address(output) else output
    with keeping(f"all that is finished is kept in {kept}: the same command continues after it"):
        _, figures = adapted(open_plm(plm, **loaded), reading.examples, chosen, output, train, build, rounds)
    show({"adapter": shown(joined(output, ADAPTER)), **figures}, as_json)
