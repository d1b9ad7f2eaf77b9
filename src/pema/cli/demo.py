"""`pema demo`: the main job, on the embedded PLM, in a few minutes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pema.cli.options import Seed


def demo(
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Also write all results to this file.", metavar="FILE")
    ] = None,
    folder: Annotated[
        Path | None, typer.Option("--keep", help="Keep memories, adapters and outputs in this folder.", metavar="DIR")
    ] = None,
    seed: Seed = 0,
) -> None:
    """Adapt the embedded English-German PLM to a company's formal customer-support German, and show the difference.

    Example: pema demo --json demo.json
    """
    import tempfile

    from pema.console import print_table
    from pema.experiments.demo import demo_experiment, run_demo, show_demo
    from pema.files import write_json

    experiment = demo_experiment(seed)
    with tempfile.TemporaryDirectory(prefix="pema-demo-") as temporary:
        place = folder or Path(temporary)
        result = run_demo(experiment, place)
        for table in show_demo(experiment, place):
            print_table(table)
    if json_file is not None:
        write_json(json_file, result)
