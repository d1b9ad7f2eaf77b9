"""The table of the demo."""

from __future__ import annotations

from pema.evaluation.notation import NOTHING, metric_name, score_text
from pema.experiments.formats import COSTS, difference_text
from pema.experiments.reader import record
from pema.experiments.records import Comparison
from reproduction.lines import RUN, read_lines
from reproduction.paths import RESULTS
from reproduction.tables.markdown import head, row, source
from reproduction.tables.results import read_run

FILE, COMMAND = RESULTS / "demo.jsonl", "pema demo --json demo.json"
SPENT = {"train_peak_bytes": "peak memory", "train_seconds": "training", "disk_bytes": "disk"}


def demo() -> str:
    """Scores and costs of each run, and how much better the adapted PLM is."""
    lines = read_lines(FILE)
    (values,) = [line["comparison"] for line in lines if "comparison" in line]
    comparison = record(Comparison, values, str(FILE))
    runs = [read_run(line, f"{FILE}, run {line[RUN]}") for line in lines if RUN in line]
    metrics = list(runs[0].scores)
    text = "### The demo\n\n500 customer-support pairs; 120 test sentences that share no template with them.\n\n"
    text += head(["", *map(metric_name, metrics), *SPENT.values()])
    for run in runs:
        cells = [score_text(name, run.scores[name].value) for name in metrics]
        paid = [COSTS[name].text(getattr(run.costs, name)) for name in SPENT]
        text += row([run.label, *cells, *(paid if run.costs.trainable_parameters else [NOTHING] * len(SPENT))])
    text += "\nPaired bootstrap (1,000 resamples), best with teacher contexts against the PLM alone, with the 95 % "
    text += "interval of the difference: "
    text += "; ".join(
        f"{metric_name(each.metric)} {difference_text(each.metric, each)}"
        for each in comparison.differences
        if each.label == "PEMA best, teacher"
    )
    return text + ".\n\n" + source(comparison.signature, COMMAND) + "\n"
