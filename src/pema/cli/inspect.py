"""`pema inspect`: which distribution decided each generated token, as one HTML page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from pema.cli.options import (
    FURTHER,
    AdapterPlace,
    AsJSON,
    OwnChatPrompts,
    OwnSystemPrompt,
    OwnTaskName,
    PLMName,
    TemplateText,
    loading,
    local_path,
    require_plm,
    show,
)
from pema.cli.settings import Options, declared
from pema.generation.config import GenerateConfig


@declared(
    settings=Options(GenerateConfig, ("schedule", "lambda_max", "max_new_tokens", "stop")),
    loaded=loading(*FURTHER),
)
def inspect(
    adapter: AdapterPlace,
    plm: PLMName,
    text: Annotated[str, typer.Option("--text", help="The source text.")],
    output: Annotated[
        Path, typer.Option("-o", "--output", callback=local_path, help="Where the page goes, e.g. page.html.")
    ],
    settings: dict[str, Any],
    loaded: dict[str, Any],
    reference: Annotated[
        str | None, typer.Option("--reference", help="A reference to show beside the generated text.")
    ] = None,
    task: OwnTaskName = None,
    template: TemplateText = None,
    chat: OwnChatPrompts = None,
    system: OwnSystemPrompt = None,
    as_json: AsJSON = False,
) -> None:
    """Generate one text greedily and write a self-contained page about which distribution decided each token.

    Example: pema inspect adapter --plm embedded --text "Where is your order?" -o page.html
    """
    from pema.adapter.store import read_config
    from pema.adapter.task import require_task, task_of

    config = read_config(adapter)
    chosen = task_of(config, task, template, chat=chat, system=system)
    require_task(config, chosen)
    ending = {name: settings.get(name) for name in ("max_new_tokens", "stop")}
    mixture = config.choose_schedule(settings.get("schedule"), settings.get("lambda_max"))

    require_plm(plm, loaded.get("revision"))

    from pema.adapter.module import Adapter
    from pema.owner.opening import open_plm
    from pema.pages.inspector.page import write_inspection

    own = Adapter.from_pretrained(adapter)
    owner = open_plm(plm, tap=config.tap, **loaded)
    result = write_inspection(output, owner, own, text, chosen, mixture, reference=reference, **ending)
    show({"output": str(output), "text": result.output, "tokens": len(result.steps)}, as_json)
