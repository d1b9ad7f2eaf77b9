"""Options that several verbs share: one place for meaning and help text."""

from __future__ import annotations

import json
from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from pema.console import printable, stdout
from pema.schema import SEED


class TapName(StrEnum):
    """Where f(c) is read: what the LM head reads, or the final norm's input (what inference servers hand out)."""

    head_input = "head_input"
    norm_input = "norm_input"


class ScheduleName(StrEnum):
    """How the mixture weight runs over a sequence."""

    unrolling = "unrolling"
    constant = "constant"
    linear = "linear"
    fitted = "fitted"


PLMName = Annotated[
    str, typer.Option("--plm", help="Hub name or local folder of the PLM; 'embedded' is the one that pema ships.")
]
TaskName = Annotated[str, typer.Option("--task", help="translation, style, summarisation, qa or classification.")]
OwnTaskName = Annotated[str | None, typer.Option("--task", help="The adapter's task; default: what it records.")]
TemplateText = Annotated[
    str | None, typer.Option("--template", help="Prompt with {source} in it, instead of the task's own.")
]
PLMDtype = Annotated[
    str | None, typer.Option("--plm-dtype", help="Precision to load the PLM in: auto, float32, float16 or bfloat16.")
]
DeviceMap = Annotated[
    str | None, typer.Option("--device-map", help="Where the PLM goes, as in transformers: cpu, cuda, auto, ...")
]
MaskSecret = Annotated[
    Path | None,
    typer.Option("--mask-secret", help="The PLM owner's secret: work with the masked head that `pema release` wrote."),
]
ScheduleOption = Annotated[
    ScheduleName | None,
    typer.Option(
        "--schedule",
        help="Mixture weight over the sequence; default: constant, or unrolling for predicted contexts.",
    ),
]
LambdaMax = Annotated[
    float | None,
    typer.Option("--lambda-max", min=0, max=1, help="Weight at the first token; default: 0.9, of constant 0.7."),
]
AsJSON = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Seed = Annotated[int, typer.Option("--seed", min=0, max=SEED, help="Seed of everything random.")]
MemoryFolder = Annotated[Path, typer.Argument(help="Folder of the external memory.", metavar="MEMORY")]


def show(result: Mapping[str, Any], as_json: bool) -> None:
    """Print a flat result: aligned lines for a person, one JSON object for a program."""
    if as_json:
        stdout.print(printable(json.dumps(result, ensure_ascii=False, indent=2)), markup=False)
        return
    width = max(map(len, result), default=0)
    for name, value in result.items():
        text = f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
        stdout.print(printable(f"{name.replace('_', ' '):<{width}}  {text}"), markup=False)
