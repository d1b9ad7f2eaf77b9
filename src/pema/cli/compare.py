"""`pema compare`: methods side by side on the same data, with the same budget."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pema.cli.options import AsJSON, local_path, require_plm, show
from pema.errors import PemaError

if TYPE_CHECKING:
    from pema.experiments.experiment import Experiment, Kind

Config = Annotated[Path, typer.Argument(help="TOML file: methods, data, budget, seeds.", metavar="CONFIG")]
Results = Annotated[
    Path, typer.Option("-o", "--output", callback=local_path, help="Gets a folder with one result file per run.")
]
Work = Annotated[
    Path,
    typer.Option(
        "--work", callback=local_path, help="Folder of memories and trained models; what exists there is used."
    ),
]
DataRoot = Annotated[
    Path | None, typer.Option("--data-root", help="Folder that the config's data paths start from; default: its own.")
]

DryRun = Annotated[
    bool,
    typer.Option("--dry-run", help="Only measure the PLM, and print what is left to do, with time and memory."),
]


def compare(
    config: Config,
    output: Results = Path("results"),
    work: Work = Path("runs"),
    data_root: DataRoot = None,
    dry_run: DryRun = False,
    as_json: AsJSON = False,
) -> None:
    """Run the missing runs of a comparison, then print its table; settings with a grid are chosen on dev.

    Example: pema compare reproduction/configs/compare/restaurants.toml -o results
    """
    run("compare", config, output, work, data_root, dry_run, as_json)


def run(
    kind: Kind, config: Path, output: Path, work: Path, data_root: Path | None, dry_run: bool, as_json: bool
) -> None:
    """Run an experiment and print its table; if a run fails or is interrupted, the table of the finished runs."""
    from pema.evaluation.classifier_name import ClassifierName
    from pema.evaluation.notation import is_style
    from pema.experiments.config import on_device, read_description

    experiment = read_description(config, kind, data_root)
    for plm in experiment.plms():
        require_plm(plm)
    for metric in filter(is_style, experiment.metrics):
        ClassifierName.of(metric).require()

    experiment = on_device(experiment)

    from pema.experiments.compare import run_experiment  # loads torch: the file is refused before

    folder = output / experiment.name
    if dry_run:
        _show_plan(experiment, output, work, as_json)
        return
    try:
        run_experiment(experiment, output, work)
    except BaseException:
        with contextlib.suppress(PemaError):  # nothing is finished, and the failure of the run is the one to report
            _show(folder, as_json)
        raise
    _show(folder, as_json)


def _show_plan(experiment: Experiment, output: Path, work: Path, as_json: bool) -> None:
    from pema.console import print_table
    from pema.experiments.plan import plan_experiment, plan_table
    from pema.experiments.table import rich_table

    lines = plan_experiment(experiment, output, work)
    if as_json:
        show({"lines": [vars(line) for line in lines]}, True)
    else:
        print_table(rich_table(plan_table(experiment, lines)))


def _show(folder: Path, as_json: bool) -> None:
    from pema.console import note, print_table
    from pema.experiments.reader import read_folder
    from pema.experiments.table import comparison_tables

    if as_json:
        results = read_folder(folder)
        missing = {"missing": list(results.missing), "uncompared": list(results.uncompared)}
        show({"results": str(folder), **results.comparison.to_dict(), **missing}, True)
        return
    for table in comparison_tables(folder):
        print_table(table)
    note(f"results: {folder}")
