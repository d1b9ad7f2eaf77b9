"""The table of the candidates for preset `best`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from reproduction.lines import files
from reproduction.paths import RESULTS
from reproduction.tables.markdown import head, row, score_text, source
from reproduction.tables.results import read_results

FOLDER, COMMAND = RESULTS / "presets", "python -m reproduction.experiments.presets DATA"


def presets() -> str:
    """What dev data said of each candidate."""
    columns = {"bleu": "BLEU", "chrf": "chrF", "formality_accuracy": "M-ACC"}
    text = head(["data (dev)", "candidate", "lambda_max", "perplexity", *columns.values(), "training (s)"])
    comparison: Mapping[str, Any] = {}
    for file in files(FOLDER):
        results = read_results(file)
        comparison = results.comparison
        for line in results.lines:
            (run,) = line.runs
            scores = [score_text(n, run["scores"][n]["value"]) if n in run["scores"] else "-" for n in columns]
            weight = run["settings"].get("lambda_max", "-")
            cells = [f"{run['dev_perplexity']:.2f}", *scores, f"{run['costs']['train_seconds']:.0f}"]
            text += row([file.stem, line.label, str(weight), *cells])
    return text + "\n" + source(comparison, COMMAND) + "\n"
