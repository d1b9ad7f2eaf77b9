"""`pema demo`: the main job, on a real language model, in a few minutes."""

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
    report: Annotated[
        Path | None, typer.Option("--report", help="Also write the report to this file, .html.", metavar="FILE")
    ] = None,
    seed: Seed = 0,
) -> None:
    """Adapt SmolLM2-135M-Instruct to a house style of restaurant descriptions, and show the difference.

    Compares the PLM alone, a few-shot prompt, and PEMA with two presets, on 500 training examples and 100 test records.

    Example: pema demo --json demo.json
    """
    import tempfile

    from pema.console import note, print_table
    from pema.experiments.demo import demo_experiment, demo_tables, run_demo
    from pema.files import write_json
    from pema.pages.report.writing import write_report

    experiment = demo_experiment(seed)
    with tempfile.TemporaryDirectory(prefix="pema-demo-") as temporary:
        workspace = folder or Path(temporary)
        result = run_demo(experiment, workspace)
        for table in demo_tables(experiment, workspace):
            print_table(table)
        if report is not None:
            write_report(workspace / "results", report)
            note(f"{report}: the report, with all texts")
    if json_file is not None:
        write_json(json_file, result)
