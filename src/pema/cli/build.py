"""`pema build`: step 1, an external memory from a PLM and examples."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from pema.cli.options import AsJSON, DeviceMap, MaskSecret, PLMDtype, PLMName, TapName, TaskName, TemplateText, show

SEQUENCE = 128
"""Tokens in a sequence of `--batch-size`: batches hold about as many tokens each, however long the sequences are."""


class Contexts(StrEnum):
    """What follows the prompt in a context."""

    teacher = "teacher"
    predicted = "predicted"


class Targets(StrEnum):
    """Which gold token a predicted context is paired with."""

    position = "position"
    aligned = "aligned"


class StorageDtype(StrEnum):
    """How representations are stored."""

    float32 = "float32"
    float16 = "float16"
    bfloat16 = "bfloat16"
    int8 = "int8"


def build(
    plm: PLMName,
    task: TaskName,
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder for the memory.", metavar="MEMORY")],
    source: Annotated[Path | None, typer.Option("--source", help="Source texts, one a line.")] = None,
    target: Annotated[Path | None, typer.Option("--target", help="Target texts, one a line.")] = None,
    data: Annotated[
        str | None, typer.Option("--data", help="JSONL or TSV file (.gz too), datasets folder, or hf:NAME:SPLIT.")
    ] = None,
    source_field: Annotated[str, typer.Option("--source-field", help="Field of --data with the source.")] = "source",
    target_field: Annotated[str, typer.Option("--target-field", help="Field of --data with the target.")] = "target",
    contexts: Annotated[Contexts, typer.Option("--contexts", help="What follows the prompt.")] = Contexts.teacher,
    targets: Annotated[Targets, typer.Option("--targets", help="Pairing in predicted mode.")] = Targets.position,
    dtype: Annotated[StorageDtype, typer.Option("--dtype", help="Storage of representations.")] = StorageDtype.float16,
    tap: Annotated[TapName, typer.Option("--tap", help="Where f(c) is read.")] = TapName.head_input,
    template: TemplateText = None,
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="Use only the first N examples.")] = None,
    batch_size: Annotated[
        int,
        typer.Option(
            "--batch-size",
            min=1,
            help=f"Sequences of {SEQUENCE} tokens that go through the PLM at once; more where they are shorter.",
        ),
    ] = 64,
    append: Annotated[bool, typer.Option("--append", help="Add the examples to a finished memory.")] = False,
    plm_dtype: PLMDtype = None,
    device_map: DeviceMap = None,
    mask_secret: MaskSecret = None,
    as_json: AsJSON = False,
) -> None:
    """Build an external memory: (context representation, target token) pairs on your own disk.

    A build that was killed goes on where it stopped when the same command runs again.

    Example: pema build --plm embedded --task translation --source train.en --target train.de -o memory
    """
    from pema.memory.build import build_memory
    from pema.owner.opening import open_plm
    from pema.tasks.readers import read_examples
    from pema.tasks.registry import get_task

    chosen = get_task(task, template)
    examples = read_examples(
        data=data, source=source, target=target, source_field=source_field, target_field=target_field, limit=limit
    )
    owner = open_plm(plm, mask_secret=mask_secret, tap=tap.value, dtype=plm_dtype, device_map=device_map)
    memory = build_memory(
        owner,
        examples,
        chosen,
        output,
        contexts=contexts.value,
        targets=targets.value,
        dtype=dtype.value,
        batch_tokens=batch_size * SEQUENCE,
        append=append,
    )
    show({"memory": str(output), "examples": memory.examples, "pairs": memory.pairs, "bytes": memory.bytes}, as_json)
