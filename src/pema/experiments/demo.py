"""The demo: the embedded PLM learns a company's formal customer-support German, in both context modes."""

from __future__ import annotations

from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any

from rich.table import Table

from pema.experiments.compare import run_experiment
from pema.experiments.config import read_config
from pema.experiments.data import Data
from pema.experiments.experiment import Experiment
from pema.experiments.reader import read_folder
from pema.experiments.table import comparison_tables
from pema.experiments.texts import read_texts
from pema.files import read_json

BEFORE, AFTER = "PLM alone", "PEMA best, teacher"
SHOWN = (BEFORE, "PEMA paper, teacher", AFTER)


def demo_experiment(seed: int = 0) -> Experiment:
    """Return the comparison of the demo: `demo.toml`, with this seed."""
    with resources.as_file(resources.files("pema") / "experiments" / "demo.toml") as file:
        return replace(read_config(file, "compare"), seeds=(seed,))


def run_demo(experiment: Experiment, folder: Path) -> dict[str, Any]:
    """Run the demo; results and work files are kept below `folder`.

    Returns:
        The content of the results' `comparison.json`, with `runs`: the result of each run, in the table's order.
    """
    comparison = run_experiment(experiment, folder / "results", folder / "work")
    names = comparison.signature.config["runs"]
    results = [read_json(folder / "results" / experiment.name / f"{run}.json") for (run,) in names.values()]
    return comparison.to_dict() | {"runs": results}


def show_demo(experiment: Experiment, folder: Path) -> list[Table]:
    """Return the tables and three test sentences, ready to print."""
    results = folder / "results" / experiment.name
    runs = read_folder(results).runs
    outputs = {label: read_texts(results, runs[label][0].run) for label in SHOWN}
    sides = Table(title="Side by side", show_header=False)
    for example in pick_examples(experiment.data, outputs):
        for name, text in example.items():
            sides.add_row(name, text, end_section=text is [*example.values()][-1])
    return [*comparison_tables(results), sides]


def pick_examples(data: Data, outputs: dict[str, list[str]], count: int = 3) -> list[dict[str, str]]:
    """Return the first `count` test sentences with an output that differs from the PLM's own, and the outputs."""
    changed = [i for i in range(len(data.test)) if outputs[BEFORE][i] != outputs[AFTER][i]]
    return [
        {"source": data.test[i].source, "reference": data.test[i].target}
        | {name: texts[i] for name, texts in outputs.items()}
        for i in changed[:count]
    ]
