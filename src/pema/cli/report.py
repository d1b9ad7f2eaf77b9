"""`pema report`: one HTML page from the results of comparisons and sweeps."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pema.cli.options import AsJSON, show


def report(
    results: Annotated[
        Path,
        typer.Argument(help="What `pema compare` or `pema sweep` wrote, or a folder of several.", metavar="RESULTS"),
    ],
    output: Annotated[Path, typer.Option("-o", "--output", help="Where the page goes.", metavar="FILE")],
    as_json: AsJSON = False,
) -> None:
    """Make one HTML page of results: table, plots, samples, and the signature of every number.

    The page loads nothing from anywhere: it can be mailed, archived and opened without a network.

    Example: pema report results -o page.html
    """
    from pema.files import writing
    from pema.pages.report.document import report as make

    page = make(results)
    with writing(output) as temporary:
        temporary.write_text(page, encoding="utf-8", newline="\n")
    show({"page": str(output), "bytes": output.stat().st_size}, as_json)
