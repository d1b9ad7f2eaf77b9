"""`pema classify`: the most probable label of each text, under the PLM and the adapter together."""

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
from pema.generation.config import GenerateConfig

CLASSIFYING = Options(GenerateConfig, ("schedule", "lambda_max", "batch_size"))


@declared(settings=CLASSIFYING, running=RUNNING, loaded=loading(*FURTHER))
def classify(
    adapter: AdapterPlace,
    plm: PLMName,
    labels: Annotated[
        Path,
        typer.Option("--labels", help="Labels to choose from, one per line, as they are written in training targets."),
    ],
    output: Annotated[
        Path,
        typer.Option(
            "-o",
            "--output",
            callback=local_path,
            help="Output file, in the order of the sources: one label per line, or (.jsonl) one JSON object per line "
            "with the label (`text`) and its probability among the labels.",
        ),
    ],
    settings: dict[str, Any],
    running: dict[str, Any],
    loaded: dict[str, Any],
    inputs: InputLines = None,
    data: InputData = None,
    source_field: InputColumn = None,
    no_adapter: Annotated[
        bool, typer.Option("--no-adapter", help="The PLM alone, for comparison; with the adapter's task.")
    ] = False,
    task: OwnTaskName = None,
    template: TemplateText = None,
    chat: OwnChatPrompts = None,
    system: OwnSystemPrompt = None,
    as_json: AsJSON = False,
) -> None:
    """Choose the most probable label of each text: the highest P(label and its end | prompt) of a list of labels.

    Example: pema classify adapter --plm embedded --labels labels.txt --input messages.txt -o labels.jsonl
    """
    from pema.adapter.store import read_config
    from pema.adapter.task import require_task, task_of
    from pema.evaluation.outputs import is_json_lines, require_writable, write_hypotheses
    from pema.tasks.labels import require_labels
    from pema.tasks.readers import read_lines

    GenerateConfig.split(settings)
    engine = EngineConfig(**running)
    require_generating(engine, plm)
    require_writable(output)
    names = require_labels(read_lines(labels))
    sources = read_inputs(inputs, data, source_field)
    config = read_config(adapter)
    chosen = task_of(config, task, template, chat=chat, system=system)
    if not no_adapter:
        require_task(config, chosen)
        config.choose_schedule(settings.get("schedule"), settings.get("lambda_max"))
        loaded["tap"] = config.tap

    require_plm(plm, loaded.get("revision"))

    from pema.adapter.module import Adapter
    from pema.cluster.opening import opened
    from pema.generation import classification

    used = None if no_adapter else Adapter.from_pretrained(adapter)
    settings["probabilities"] = is_json_lines(output)
    with opened(plm, engine, **loaded) as choosing:
        result = classification.classify(choosing, used, sources, names, chosen, **settings)
    details = None
    if result.log_probs is not None:
        details = [
            {"source": each if isinstance(each, str) else each.source, "probability": round(probability, 6)}
            for each, probability in zip(sources, result.probabilities.amax(1).tolist(), strict=True)
        ]
    write_hypotheses(output, result.choices, details)
    show({"output": str(output), "lines": len(sources), "labels": len(names)}, as_json)
