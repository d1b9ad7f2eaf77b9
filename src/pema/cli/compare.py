"""`pema compare`: methods side by side on the same data, with the same budget."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from pema.experiments.experiment import Kind

Config = Annotated[Path, typer.Argument(help="TOML file: methods, data, budget, seeds.", metavar="CONFIG")]
Results = Annotated[Path, typer.Option("-o", "--output", help="Gets a folder with one result file a run.")]
Work = Annotated[Path, typer.Option("--work", help="Where memories and trained models lie, to be used again.")]
DataRoot = Annotated[
    Path | None, typer.Option("--data-root", help="Folder that the config's data paths start from; default: its own.")
]


def compare(
    config: Config,
    output: Results = Path("results"),
    work: Work = Path("runs"),
    data_root: DataRoot = None,
) -> None:
    """Run what is missing of a comparison, then print its table; settings with a grid are chosen on dev.

    Example: pema compare reproduction/configs/compare/support.toml -o results
    """
    run("compare", config, output, work, data_root)


def run(kind: Kind, config: Path, output: Path, work: Path, data_root: Path | None) -> None:
    """Run an experiment and print its table."""
    from pema.console import note, print_table
    from pema.experiments.compare import run_experiment
    from pema.experiments.config import read_config
    from pema.experiments.table import comparison_tables

    experiment = read_config(config, kind, data_root)
    run_experiment(experiment, output, work)
    for table in comparison_tables(output / experiment.name):
        print_table(table)
    note(f"results: {output / experiment.name}")
