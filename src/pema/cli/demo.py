"""`pema demo`: the main job, on a real language model, in a few minutes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pema.cli.options import AsJSON, Seed, local_path, require_plm, show


def demo(
    output: Annotated[
        Path | None,
        typer.Option(
            "-o", "--output", callback=local_path, help="Also write all results to this file, .json.", metavar="FILE"
        ),
    ] = None,
    folder: Annotated[
        Path | None,
        typer.Option(
            "--keep", callback=local_path, help="Keep memories, adapters and outputs in this folder.", metavar="DIR"
        ),
    ] = None,
    report: Annotated[
        Path | None,
        typer.Option(
            "--report",
            callback=local_path,
            help="Also write the report to this file: .html, .md, .tex or .csv.",
            metavar="FILE",
        ),
    ] = None,
    seed: Seed = 0,
    as_json: AsJSON = False,
) -> None:
    """Adapt SmolLM2-135M-Instruct to a house style of restaurant descriptions, and show the difference.

    Compares the PLM alone, a few-shot prompt, and PEMA with two presets, on 500 training examples and 100 test records.

    Example: pema demo --report demo.html
    """
    import tempfile

    from pema.console import note, print_table
    from pema.files import write_json
    from pema.pages.report.writing import write_report, writer_of

    if report is not None:
        writer_of(report)  # refuses a suffix before the work

    require_plm("smollm2-135m")

    from pema.experiments.demo import demo_experiment, demo_tables, run_demo

    experiment = demo_experiment(seed)
    with tempfile.TemporaryDirectory(prefix="pema-demo-") as temporary:
        workspace = folder or Path(temporary)
        result = run_demo(experiment, workspace)
        if as_json:
            show(result, True)
        else:
            for table in demo_tables(experiment, workspace):
                print_table(table)
        if report is not None:
            write_report(workspace / "results", report)
            note(f"{report}: the report, with all texts")
        if output is not None:
            write_json(output, result)
            note(f"{output}: all results")
