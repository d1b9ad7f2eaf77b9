"""The table of the candidates for preset `best`."""

from __future__ import annotations

from pema.evaluation.notation import NOTHING, metric_name
from reproduction.lines import files
from reproduction.paths import RESULTS
from reproduction.tables.markdown import head, row, source
from reproduction.tables.results import DEV, SECONDS, lines_of, read_results

FOLDER, COMMAND = RESULTS / "presets", "python -m reproduction.experiments.presets DATA"


def presets() -> str:
    """Return a table of each candidate's scores on dev data."""
    metrics = ("bleu", "chrf", "formality_accuracy")
    text = head(["data (dev)", "candidate", "lambda_max", "perplexity", *map(metric_name, metrics), "training"])
    for file in files(FOLDER):
        results = read_results(file)
        for line in lines_of(results):
            (run,) = line.runs
            scores = [line.text(name) if name in run.scores else NOTHING for name in metrics]
            weight = run.settings.get("lambda_max", NOTHING)
            text += row([file.stem, line.label, str(weight), line.text(DEV), *scores, line.text(SECONDS)])
    return text + "\n" + source(results.comparison.signature, COMMAND) + "\n"
