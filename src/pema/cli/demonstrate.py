"""`pema demonstrate`: data with solved examples in front of each source."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from pema.cli.options import (
    AsJSON,
    InputLines,
    PairsData,
    SourceColumn,
    TargetColumn,
    TaskName,
    TemplateText,
    local_path,
    show,
)


def demonstrate(
    task: TaskName,
    pool: Annotated[
        str, typer.Option("--pool", help="Data of solved examples, such as the training data; read as --data is.")
    ],
    output: Annotated[
        Path,
        typer.Option("-o", "--output", callback=local_path, help="Output file in JSON Lines.", metavar="FILE.jsonl"),
    ],
    k: Annotated[int, typer.Option("-k", help="Number of demonstrations in front of each source.", min=1)] = 3,
    inputs: InputLines = None,
    data: PairsData = None,
    source_field: SourceColumn = None,
    target_field: TargetColumn = None,
    template: TemplateText = None,
    as_json: AsJSON = False,
) -> None:
    """Put the most similar solved examples in front of each source, as earlier turns of a chat.

    An adapter learns from the written data, and generates for them, with the same task and template. Training data are
    their own pool: an example is never in front of its own source.

    Example: pema demonstrate --task reply --data train.jsonl --pool train.jsonl -o shown.jsonl
    """
    from pema.cli.sources import read_inputs
    from pema.errors import ConfigError
    from pema.evaluation.outputs import is_json_lines
    from pema.tasks.demonstrations import demonstrate as demonstrated
    from pema.tasks.example import Example
    from pema.tasks.readers import read_examples
    from pema.tasks.registry import get_task
    from pema.tasks.writer import write_examples

    if not is_json_lines(output):
        raise ConfigError(f"{output}: earlier turns need JSON Lines: name it .jsonl.")
    chosen = get_task(task, template)
    fields: dict[str, Any] = {"source_field": source_field, "target_field": target_field}
    if inputs is None and data is not None:
        examples = read_examples(data, **fields)
    else:
        examples = [Example(str(each), "") for each in read_inputs(inputs, data, source_field)]
    found = demonstrated(examples, read_examples(pool, **fields), k, chosen)
    write_examples(output, found)
    turns = sum(len(example.history) for example in found)
    show({"output": str(output), "examples": len(found), "turns": turns}, as_json)
