"""`pema evaluate`: scores of hypotheses against references."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pema.cli.options import AsJSON, TaskName, show


def evaluate(
    task: TaskName,
    hypotheses: Annotated[Path, typer.Option("--hypotheses", help="Generated texts, one a line.")],
    references: Annotated[Path, typer.Option("--references", help="Reference texts, one a line.")],
    formal: Annotated[
        Path | None, typer.Option("--formal", help="Formal references with CoCoA-MT formality marks, for M-ACC.")
    ] = None,
    informal: Annotated[
        Path | None, typer.Option("--informal", help="Informal references with CoCoA-MT formality marks, for M-ACC.")
    ] = None,
    as_json: AsJSON = False,
) -> None:
    """Score hypotheses with the task's metrics; every score carries its signature.

    Example: pema evaluate --task translation --hypotheses out.de --references test.de --json
    """
    from pema.errors import ConfigError
    from pema.evaluation.evaluate import evaluate as score
    from pema.tasks.readers import read_lines
    from pema.tasks.registry import get_task

    if (formal is None) != (informal is None):
        raise ConfigError("--formal and --informal go together: M-ACC compares the marks of both references.")
    annotated = None if formal is None or informal is None else (read_lines(formal), read_lines(informal))
    scores = score(get_task(task), read_lines(hypotheses), read_lines(references), annotated=annotated)
    if as_json:
        show({name: {"value": found.value, "signature": found.signature} for name, found in scores.items()}, True)
    else:
        show({name: f"{found.value:.2f}  {found.signature}" for name, found in scores.items()}, False)
