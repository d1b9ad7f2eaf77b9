"""`pema build`: step 1, an external memory from a PLM and examples."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from pema.cli.options import (
    AsJSON,
    ChatPrompts,
    PLMName,
    SystemPrompt,
    TaskName,
    TemplateText,
    loading,
    require_plm,
    show,
)
from pema.cli.settings import Options, declared
from pema.memory.config import BuildConfig

BUILDING = Options(BuildConfig, ("contexts", "targets", "dtype", "limit", "batch_tokens"), rest=True)
LOADING = loading("tap", "dtype", "device_map", "revision", "mask_secret")


@declared(building=BUILDING, loaded=LOADING)
def build(
    plm: PLMName,
    task: TaskName,
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder for the memory.", metavar="MEMORY")],
    building: dict[str, Any],
    loaded: dict[str, Any],
    source: Annotated[Path | None, typer.Option("--source", help="Source texts, one per line.")] = None,
    target: Annotated[Path | None, typer.Option("--target", help="Target texts, one per line.")] = None,
    data: Annotated[
        str | None,
        typer.Option(
            "--data",
            help="JSONL, JSON, CSV, TSV or Parquet file (.gz too), folder of a data set, or hf:NAME:SPLIT; "
            "instead of --source and --target.",
        ),
    ] = None,
    source_field: Annotated[
        str | None, typer.Option("--source-field", help="Column of --data with the source; default: recognised.")
    ] = None,
    target_field: Annotated[
        str | None, typer.Option("--target-field", help="Column of --data with the target; default: recognised.")
    ] = None,
    template: TemplateText = None,
    chat: ChatPrompts = None,
    system: SystemPrompt = None,
    append: Annotated[bool, typer.Option("--append", help="Add the examples to a finished memory.")] = False,
    as_json: AsJSON = False,
) -> None:
    """Build an external memory: (context representation, target token) pairs on your own disk.

    The same command resumes a build that was interrupted.

    Example: pema build --plm embedded --task translation --source train.en --target train.de -o memory
    """
    from pema.console import keeping, note
    from pema.memory.manifest import require_path
    from pema.tasks.readers import read
    from pema.tasks.registry import get_task

    config = BuildConfig(**building)
    require_path(output, append=append)
    chosen = get_task(task, template, chat=chat, system=system)
    fields = {"source_field": source_field, "target_field": target_field}
    reading = read(data, source=source, target=target, **fields, limit=config.limit)
    note(str(reading))
    require_plm(plm, loaded.get("revision"))

    from pema.memory.build import build_memory
    from pema.owner.opening import open_plm

    with keeping(f"what the PLM has answered is kept in {output}: the same command continues after it"):
        memory = build_memory(open_plm(plm, **loaded), reading.examples, chosen, output, config, append=append)
    show({"memory": str(output), "examples": memory.examples, "pairs": memory.pairs, "bytes": memory.bytes}, as_json)
