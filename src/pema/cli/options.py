"""Options that several verbs share: one place for meaning and help text."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from pema.cli.settings import Options, with_line_breaks
from pema.console import printable, stdout
from pema.owner.config import LoadConfig
from pema.schema import SEED, require

PLMName = Annotated[
    str,
    typer.Option(
        "--plm",
        help="The PLM: a packaged one (smollm2-135m), a hub name, a folder, a GGUF file, or a server's address; "
        "'embedded' is bundled for tests.",
    ),
]
TaskName = Annotated[str, typer.Option("--task", help="translation, style, summarisation, qa or classification.")]
OwnTaskName = Annotated[str | None, typer.Option("--task", help="The adapter's task; default: what it records.")]
TemplateText = Annotated[
    str | None,
    typer.Option(
        "--template",
        help="Prompt with {source} in it, instead of the task's own; \\n stands for a line break.",
        parser=with_line_breaks,
        metavar="TEXT",
    ),
]
ChatPrompts = Annotated[
    bool | None,
    typer.Option(
        "--chat/--no-chat",
        help="Prompts in the PLM's chat template, or plain; default: in the chat template if the PLM has one.",
        show_default=False,
    ),
]
OwnChatPrompts = Annotated[
    bool | None,
    typer.Option(
        "--chat/--no-chat",
        help="Prompts in the PLM's chat template, or plain; default: as the adapter was trained.",
        show_default=False,
    ),
]
SystemPrompt = Annotated[
    str | None, typer.Option("--system", help="System prompt of the chat; default: the chat template's own.")
]
OwnSystemPrompt = Annotated[str | None, typer.Option("--system", help="System prompt; default: the adapter's.")]


def loading(*names: str) -> Options:
    """Options for how the PLM is loaded."""
    return Options(LoadConfig, names, flags={"dtype": "--plm-dtype"})


FURTHER = ("dtype", "device_map", "revision", "mask_secret")
"""Of a PLM whose tap an adapter says."""

AsJSON = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Seed = Annotated[int, typer.Option("--seed", help="Seed of everything random. (at least 0)")]
MemoryFolder = Annotated[Path, typer.Argument(help="Folder of the external memory.", metavar="MEMORY")]


def check_seed(seed: int) -> None:
    """Refuse a seed that is none.

    Raises:
        ConfigError: it is negative, or larger than a seed can be.
    """
    require("--seed", seed, int, least=0, most=SEED)


def show(result: Mapping[str, Any], as_json: bool) -> None:
    """Print a flat result: aligned lines for a person, one JSON object for a program."""
    if as_json:
        stdout.print(printable(json.dumps(result, ensure_ascii=False, indent=2)), markup=False)
        return
    width = max(map(len, result), default=0)
    for name, value in result.items():
        text = f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
        stdout.print(printable(f"{name.replace('_', ' '):<{width}}  {text}"), markup=False)
