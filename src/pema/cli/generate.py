"""`pema generate`: step 4, text from the PLM and the adapter together."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from pema.cli.options import (
    FURTHER,
    AsJSON,
    OwnChatPrompts,
    OwnSystemPrompt,
    OwnTaskName,
    PLMName,
    TemplateText,
    loading,
    show,
)
from pema.cli.settings import Options, declared
from pema.generation.config import GenerateConfig

GENERATING = Options(
    GenerateConfig,
    ("schedule", "lambda_max", "batch_size", "num_beams", "max_new_tokens"),
    rest=True,
    further="and settings of transformers' generate, such as temperature",
)


@declared(settings=GENERATING, loaded=loading(*FURTHER))
def generate(
    adapter: Annotated[Path, typer.Argument(help="Folder or hub name of the adapter.", metavar="ADAPTER")],
    plm: PLMName,
    inputs: Annotated[Path, typer.Option("--input", help="Source texts, one a line.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Where the texts go, one a line, in the same order.")],
    settings: dict[str, Any],
    loaded: dict[str, Any],
    no_adapter: Annotated[bool, typer.Option("--no-adapter", help="The PLM alone, for comparison.")] = False,
    task: OwnTaskName = None,
    template: TemplateText = None,
    chat: OwnChatPrompts = None,
    system: OwnSystemPrompt = None,
    as_json: AsJSON = False,
) -> None:
    """Generate with the PLM and the adapter: P = lambda_t P_PEMA + (1 - lambda_t) P_LM.

    Example: pema generate adapter --plm embedded --input test.en -o test.de
    """
    from pema.adapter.store import read_config
    from pema.adapter.task import require_task, task_of
    from pema.tasks.readers import read_lines
    from pema.tasks.registry import get_task

    GenerateConfig.split(settings)
    sources = read_lines(inputs)
    config = None if no_adapter and task is not None else read_config(adapter)
    chosen = (
        get_task(task or "", template, chat=chat, system=system)
        if config is None
        else task_of(config, task, template, chat=chat, system=system)
    )
    if config is not None and not no_adapter:
        require_task(config, chosen)
        config.choose_schedule(settings.get("schedule"), settings.get("lambda_max"))
        loaded["tap"] = config.tap

    from pema.adapter.module import Adapter
    from pema.evaluation.outputs import write_hypotheses
    from pema.generation.decoding import generate_counted
    from pema.owner.opening import open_plm

    used = None if no_adapter else Adapter.from_pretrained(adapter)
    result = generate_counted(open_plm(plm, **loaded), used, sources, chosen, **settings)
    write_hypotheses(output, result.texts)
    show({"output": str(output), "lines": len(result.texts), "cut": result.cut}, as_json)
