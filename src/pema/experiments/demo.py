"""The demo: a language model learns a house style from 500 descriptions of restaurants."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from pema.experiments.compare import run_experiment
from pema.experiments.config import read_config
from pema.experiments.data import Data
from pema.experiments.experiment import Experiment
from pema.experiments.reader import read_results
from pema.experiments.table import comparison_tables
from pema.files import read_json

SAMPLES = 8


def demo_experiment(seed: int = 0) -> Experiment:
    """Return the comparison of the demo: `demo.toml`, with this seed."""
    with resources.as_file(resources.files("pema") / "experiments" / "demo.toml") as file:
        return replace(read_config(file, "compare"), seeds=(seed,))


def run_demo(experiment: Experiment, folder: Path) -> dict[str, Any]:
    """Run the demo in `folder`, which keeps the results and what they are made from.

    Returns:
        The content of `comparison.json` of the results, with `runs`: the result of each run, in the table's order.
    """
    comparison = run_experiment(experiment, folder / "results", folder / "work")
    names = comparison.signature.config["runs"]
    results = [read_json(folder / "results" / experiment.name / f"{run}.json") for (run,) in names.values()]
    return comparison.to_dict() | {"runs": results}


def demo_tables(experiment: Experiment, folder: Path) -> list[Table]:
    """Return the tables and samples of the demo in `folder`, ready to print."""
    results_folder = folder / "results" / experiment.name
    (results,) = read_results(results_folder)
    outputs = {label: results.outputs[runs[0].run] for label, runs in results.runs.items()}
    samples = Table(title="Samples: the first records of the test set", show_header=False)
    for fields in side_by_side(experiment.data, outputs):
        for name, text in fields.items():
            samples.add_row(Text(name), Text(text), end_section=name == list(fields)[-1])
    return [*comparison_tables(results_folder), samples]


def side_by_side(data: Data, outputs: Mapping[str, Sequence[str]], count: int = SAMPLES) -> list[dict[str, str]]:
    """Return, for the first `count` test examples, the source, a reference and the text of each method."""
    return [
        {"source": example.source, "reference": example.target} | {name: texts[i] for name, texts in outputs.items()}
        for i, example in enumerate(data.test[:count])
    ]
