"""`pema demo`: the main job, on the embedded PLM, in a few minutes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def demo(
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Also write the table and its signature to this file.", metavar="FILE")
    ] = None,
    folder: Annotated[
        Path | None, typer.Option("--keep", help="Keep memories, adapters and outputs in this folder.", metavar="DIR")
    ] = None,
    seed: Annotated[int, typer.Option("--seed", help="Seed of everything random.")] = 0,
) -> None:
    """Adapt the embedded English-German PLM to a company's formal customer-support German, and show the difference.

    Example: pema demo --json demo.json
    """
    import tempfile

    from pema.console import stdout
    from pema.experiments.demo import run_demo, show_demo
    from pema.files import write_json

    with tempfile.TemporaryDirectory(prefix="pema-demo-") as temporary:
        result, examples = run_demo(folder or Path(temporary), seed=seed)
    for table in show_demo(result, examples):
        stdout.print(table)
    if json_file is not None:
        write_json(json_file, result)
