"""`pema report`: one HTML page, or the tables alone, from the results of comparisons and sweeps."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pema.cli.options import AsJSON, local_path, show


def report(
    results: Annotated[
        Path,
        typer.Argument(help="What `pema compare` or `pema sweep` wrote, or a folder of several.", metavar="RESULTS"),
    ],
    output: Annotated[
        Path,
        typer.Option(
            "-o",
            "--output",
            callback=local_path,
            help="File of the report; its suffix decides: .html is the page, .md, .tex and .csv are the tables.",
            metavar="FILE",
        ),
    ],
    as_json: AsJSON = False,
) -> None:
    """Write the report of results: an HTML page with tables, plots, samples and every signature, or the tables alone.

    The page loads nothing from anywhere: it can be mailed, archived and opened without a network. A comparison that is
    not finished has a report too: of the finished runs, with the names of the others.

    Example: pema report results -o page.html
    """
    from pema.pages.report.writing import write_report

    experiments = write_report(results, output)
    missing = {each.about.name: list(each.missing) for each in experiments if each.missing}
    written = {"report": str(output), "bytes": output.stat().st_size, "experiments": len(experiments)}
    if as_json:
        show({**written, "missing": missing}, True)
    else:
        show(written | {f"not finished in {name}": ", ".join(runs) for name, runs in missing.items()}, False)
