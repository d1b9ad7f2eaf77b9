"""`pema sweep`: every point of a grid."""

from __future__ import annotations

from pathlib import Path

from pema.cli.compare import Config, DataRoot, DryRun, Results, Work, run
from pema.cli.options import AsJSON


def sweep(
    config: Config,
    output: Results = Path("results"),
    work: Work = Path("runs"),
    data_root: DataRoot = None,
    dry_run: DryRun = False,
    as_json: AsJSON = False,
) -> None:
    """Run the missing runs of every point of the config's grids, then print the table.

    Example: pema sweep reproduction/configs/studies/rank.toml -o results
    """
    run("sweep", config, output, work, data_root, dry_run, as_json)
