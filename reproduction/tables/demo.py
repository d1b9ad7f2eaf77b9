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

FILE, COMMAND = RESULTS / "demo.jsonl", "pema demo --output demo.json"
SPENT = {"train_peak_bytes": "peak memory", "train_seconds": "training", "disk_bytes": "disk"}
ADAPTED = "PEMA best"


def demo() -> str:
    """Return scores and costs of each run, and the differences of the adapted PLM."""
    lines = read_lines(FILE)
    (values,) = [line["comparison"] for line in lines if "comparison" in line]
    comparison = record(Comparison, values, str(FILE))
    runs = [read_run(line, f"{FILE}, run {line[RUN]}") for line in lines if RUN in line]
    metrics = list(runs[0].scores)
    text = (
        "SmolLM2-135M-Instruct learns from 500 descriptions of restaurants (E2E NLG); 100 test records. "
        "SER, the slot error rate, is the share of facts that a text leaves out, changes or invents (texts by people: "
        "about 8 %).\n\n"
    )
    text += head(["", *map(metric_name, metrics), *SPENT.values()])
    for run in runs:
        cells = [score_text(name, run.scores[name].value) for name in metrics]
        paid = [COSTS[name].text(getattr(run.costs, name)) for name in SPENT]
        text += row([run.label, *cells, *(paid if run.costs.trainable_parameters else [NOTHING] * len(SPENT))])
    text += f"\nDifferences of {ADAPTED} with their 95 % interval and p (paired bootstrap, 1,000 resamples):"
    for reference, differences in comparison.by_reference().items():
        each = [f"{metric_name(name)} {difference_text(name, differences[ADAPTED, name])}" for name in metrics]
        text += f" from {reference} {', '.join(each)};"
    return text.removesuffix(";") + ".\n\n" + source(comparison.signature, COMMAND) + "\n"
