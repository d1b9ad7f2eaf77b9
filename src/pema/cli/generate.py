"""`pema generate`: step 4, text from the PLM and the adapter together."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from pema.cli.options import (
    FURTHER,
    RUNNING,
    AdapterPlace,
    AsJSON,
    InputColumn,
    InputData,
    InputLines,
    OwnChatPrompts,
    OwnSystemPrompt,
    OwnTaskName,
    PLMName,
    TemplateText,
    loading,
    local_path,
    require_generating,
    require_plm,
    show,
)
from pema.cli.settings import Options, declared
from pema.cli.sources import read_inputs
from pema.cluster.config import EngineConfig
from pema.generation.config import GenerateConfig, with_own_ending

GENERATING = Options(
    GenerateConfig,
    ("schedule", "lambda_max", "batch_size", "num_beams", "max_new_tokens", "stop"),
    rest=True,
    further="and settings of transformers' generate, such as temperature",
)


@declared(settings=GENERATING, running=RUNNING, loaded=loading(*FURTHER))
def generate(
    adapter: AdapterPlace,
    plm: PLMName,
    output: Annotated[
        Path,
        typer.Option(
            "-o",
            "--output",
            callback=local_path,
            help="Output file, in the order of the sources: one text per line, or (.jsonl) one JSON object per line, "
            "which keeps texts of several lines.",
        ),
    ],
    settings: dict[str, Any],
    running: dict[str, Any],
    loaded: dict[str, Any],
    inputs: InputLines = None,
    data: InputData = None,
    source_field: InputColumn = None,
    no_adapter: Annotated[
        bool,
        typer.Option(
            "--no-adapter", help="The PLM alone, for comparison; with the adapter's task, token limit and stop strings."
        ),
    ] = False,
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
    from pema.evaluation.outputs import require_writable, write_hypotheses

    GenerateConfig.split(settings)
    engine = EngineConfig(**running)
    require_generating(engine, plm)
    require_writable(output)
    sources = read_inputs(inputs, data, source_field)
    config = read_config(adapter)
    chosen = task_of(config, task, template, chat=chat, system=system)
    if not no_adapter:
        require_task(config, chosen)
        config.choose_schedule(settings.get("schedule"), settings.get("lambda_max"))
        loaded["tap"] = config.tap
    settings = with_own_ending(config, settings)

    require_plm(plm, loaded.get("revision"))

    from pema.adapter.module import Adapter
    from pema.cluster.opening import opened
    from pema.generation.decoding import generate_counted

    used = None if no_adapter else Adapter.from_pretrained(adapter)
    with opened(plm, engine, **loaded) as writing:
        result = generate_counted(writing, used, sources, chosen, **settings)
    details = [
        {"source": each if isinstance(each, str) else each.source, "finish_reason": reason}
        for each, reason in zip(sources, result.finish_reasons, strict=True)
    ]
    write_hypotheses(output, result.texts, details)
    ending = {"max_new_tokens": settings["max_new_tokens"] or "2 SL + 16", "stop": list(settings["stop"])}
    counts = {"lines": len(sources), "cut": result.cut, "stopped": result.stopped}
    show({"output": str(output), **counts, **ending}, as_json)
