"""`pema build`: step 1, an external memory from a PLM and examples."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from pema.cli.options import (
    RUNNING,
    AsJSON,
    ChatPrompts,
    PairsData,
    PLMName,
    SourceColumn,
    SourceLines,
    SystemPrompt,
    TargetColumn,
    TargetLines,
    TaskName,
    TemplateText,
    loading,
    require_plm,
    show,
)
from pema.cli.settings import Options, declared
from pema.cluster.config import EngineConfig
from pema.errors import ConfigError
from pema.extras import require_library
from pema.memory.config import BuildConfig
from pema.storage.address import shown

BUILDING = Options(BuildConfig, ("contexts", "targets", "dtype", "limit", "batch_tokens"), rest=True)
LOADING = loading("tap", "dtype", "device_map", "revision", "mask_secret")


@declared(building=BUILDING, running=RUNNING, loaded=LOADING)
def build(
    plm: PLMName,
    task: TaskName,
    output: Annotated[
        str, typer.Option("-o", "--output", help="Folder for the memory, or its address (s3://...).", metavar="MEMORY")
    ],
    building: dict[str, Any],
    running: dict[str, Any],
    loaded: dict[str, Any],
    source: SourceLines = None,
    target: TargetLines = None,
    data: PairsData = None,
    source_field: SourceColumn = None,
    target_field: TargetColumn = None,
    template: TemplateText = None,
    chat: ChatPrompts = None,
    system: SystemPrompt = None,
    append: Annotated[bool, typer.Option("--append", help="Add the examples to a finished memory.")] = False,
    adapter: Annotated[
        str | None,
        typer.Option(
            "--adapter", help="Adapter that writes the text of predicted contexts; default: the PLM.", metavar="ADAPTER"
        ),
    ] = None,
    as_json: AsJSON = False,
) -> None:
    """Build an external memory: (context representation, target token) pairs on your own disk.

    The same command resumes a build that was interrupted. `accelerate launch -m pema build ...` builds the same memory
    on several devices.

    Example: pema build --plm embedded --task translation --source train.en --target train.de -o memory
    """
    from pema.console import keeping, note
    from pema.memory.manifest import require_path
    from pema.memory.places import MEMORY, require_folder
    from pema.processes import join
    from pema.storage.publishing import destination
    from pema.tasks.readers import read
    from pema.tasks.registry import get_task

    processes = join()
    config, engine = BuildConfig(**building), EngineConfig(**running)
    require_folder(output, processes)
    if engine.engine == "ray":
        require_library("--engine ray", "ray", "ray")
        if adapter is not None or processes.count > 1:
            raise ConfigError("engine='ray' is for one process without an adapter: omit the launcher and --adapter.")
    with destination(output, MEMORY) as folder:
        if processes.is_writer:
            require_path(folder, append=append)
        chosen = get_task(task, template, chat=chat, system=system)
        fields = {"source_field": source_field, "target_field": target_field}
        reading = read(data, source=source, target=target, **fields, limit=config.limit)
        note(str(reading))
        require_plm(plm, loaded.get("revision"))

        from pema.adapter.module import Adapter
        from pema.cluster.opening import opened
        from pema.cluster.replicas import Replicas
        from pema.generation.on_policy import OnPolicy
        from pema.memory.build import build_memory
        from pema.owner.opening import accepted

        writer = None if adapter is None else Adapter.from_pretrained(adapter)
        with keeping(f"what the PLM has answered is kept in {folder}: the same command continues after it"):
            if processes.runs_on_accelerator and loaded.get("device_map") in (None, "auto"):
                loaded |= accepted(plm, {"device_map": str(processes.device)})
            with opened(plm, engine, **loaded) as asked:
                answering = asked if writer is None or isinstance(asked, Replicas) else OnPolicy(asked, writer)
                memory = build_memory(answering, reading.examples, chosen, folder, config, append=append)
    show({"memory": shown(output), "examples": memory.examples, "pairs": memory.pairs, "bytes": memory.bytes}, as_json)
