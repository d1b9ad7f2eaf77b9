"""Conversion of the folders of `pema compare`, `pema sweep` and `pema demo` into committed files, and back.

    python -m reproduction.folders pack runs/results/e2e-nlg-2-texts reproduction/results/compare/e2e-nlg-2-texts.jsonl
    python -m reproduction.folders pack demo.json reproduction/results/demo.jsonl
    python -m reproduction.folders unpack reproduction/results/compare/e2e-nlg-2-texts.jsonl runs/results/e2e

`pack` also reads the file of `pema demo --output`. An unpacked folder equals the original, so `pema report` shows it.
Test examples are included if the project may redistribute them: bundled data. Texts are left out where they repeat
sentences that it may not redistribute.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from pema.errors import DataError
from pema.evaluation.evaluate import LABEL_ACCURACY
from pema.experiments.compare import run_experiment
from pema.experiments.data import SHIPPED
from pema.experiments.experiment import Experiment
from pema.experiments.layout import COMET, COMPARISON, EXPERIMENT, TEST
from pema.experiments.texts import read_labels, read_texts, write_texts
from pema.files import read_json, write_json, writing
from reproduction.lines import LABELS, RUN, TEXTS, read_lines, read_runs, write_lines

EXAMPLES = "examples"

REPEATING = ("asset",)
"""Data that are for evaluation only and whose texts repeat most of their sources."""


def pack(folder: Path) -> list[dict[str, Any]]:
    """Read a folder of results as lines.

    Raises:
        DataError: it holds no finished experiment.
    """
    if not (folder / COMPARISON).exists():
        raise DataError(f"{folder} has no {COMPARISON}: let the experiment finish first.")
    experiment, comparison = read_json(folder / EXPERIMENT), read_json(folder / COMPARISON)
    lines: list[dict[str, Any]] = [{"experiment": experiment}]
    for names in comparison["signature"]["config"]["runs"].values():
        for name in names:
            run = read_json(folder / f"{name}.json")
            if experiment["data"]["name"] not in REPEATING:
                run[TEXTS] = read_texts(folder, name)
            if LABEL_ACCURACY in run["scores"]:
                run[LABELS] = read_labels(folder, name)
            scores = folder / COMET / f"{name}.json"
            lines.append(run | ({COMET: read_json(scores)} if scores.exists() else {}))
    lines.append({"comparison": comparison})
    if experiment["data"]["name"] in SHIPPED:
        lines.append({EXAMPLES: read_lines(folder / TEST)})
    return lines


def pack_demo(file: Path) -> list[dict[str, Any]]:
    """Read the file of `pema demo --output` as lines."""
    comparison = read_json(file)
    return [*comparison.pop("runs"), {"comparison": comparison}]


def unpack(file: Path, folder: Path) -> None:
    """Write the folder that a file was packed from, atomically.

    Raises:
        DataError: the file holds no experiment with its comparison.
    """
    lines = read_lines(file)
    fields: dict[str, Any] = {name: value for line in lines if RUN not in line for name, value in line.items()}
    if not {"experiment", "comparison"} <= set(fields):
        raise DataError(f"{file} lacks the line `experiment` or `comparison`: it was not packed from a folder.")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with writing(folder) as temporary:
        temporary.mkdir()
        write_json(temporary / EXPERIMENT, fields["experiment"])
        write_json(temporary / COMPARISON, fields["comparison"])
        for name, run in read_runs(file).items():
            if TEXTS in run:
                write_texts(temporary, name, run.pop(TEXTS), run.pop(LABELS, None))
            if COMET in run:
                (temporary / COMET).mkdir(exist_ok=True)
                write_json(temporary / COMET / f"{name}.json", run.pop(COMET))
            write_json(temporary / f"{name}.json", run)
        if EXAMPLES in fields:
            write_lines(temporary / TEST, fields[EXAMPLES])


def run_into(file: Path, experiment: Experiment, work: Path) -> None:
    """Run an experiment and pack it into its committed file.

    Args:
        file: of the results; it is replaced when all runs are finished.
        experiment: what to run.
        work: memories, trained models and, below `results`, the folder of the runs; finished ones there are skipped.
    """
    results = work / "results" / file.parent.name
    run_experiment(experiment, results, work)
    write_lines(file, pack(results / experiment.name))


def main() -> None:
    """Pack or unpack the paths of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("pack", "unpack"))
    parser.add_argument("source", type=Path, help="the folder to pack, or the file to unpack")
    parser.add_argument("output", type=Path)
    given = parser.parse_args()
    if given.what == "unpack":
        unpack(given.source, given.output)
    else:
        write_lines(given.output, pack(given.source) if given.source.is_dir() else pack_demo(given.source))


if __name__ == "__main__":
    main()
