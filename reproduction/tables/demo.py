"""The table of the demo."""

from __future__ import annotations

from reproduction.lines import RUN, read_lines
from reproduction.paths import RESULTS
from reproduction.tables.markdown import head, row, score_text, source

FILE, COMMAND = RESULTS / "demo.jsonl", "pema demo --json demo.json"


def demo() -> str:
    """Scores and costs of each run, and how much better the adapted PLM is."""
    lines = read_lines(FILE)
    (comparison,) = [line["comparison"] for line in lines if "comparison" in line]
    names = {"bleu": "BLEU", "chrf": "chrF", "formality_accuracy": "formality accuracy"}
    text = "### The demo\n\n500 customer-support pairs; 120 test sentences that share no template with them.\n\n"
    text += head(["", *names.values(), "peak memory (MB)", "training (s)", "disk (MB)"])
    for run in (line for line in lines if RUN in line):
        costs = run["costs"]
        cells = [score_text(name, run["scores"][name]["value"]) for name in names]
        paid = [
            f"{costs['train_peak_bytes'] / 1e6:.0f}",
            f"{costs['train_seconds']:.0f}",
            f"{costs['disk_bytes'] / 1e6:.1f}",
        ]
        text += row([run["label"], *cells, *(paid if costs["trainable_parameters"] else ["-"] * 3)])
    text += "\nPaired bootstrap (1,000 resamples), best with teacher contexts against the PLM alone: "
    text += "; ".join(
        f"{names[c['metric']]} {c['difference']:+.2f} (95 % interval {c['low']:+.2f} to {c['high']:+.2f}, p "
        f"{c['p_value']:.3f})"
        for c in comparison["differences"]
        if c["label"] == "PEMA best, teacher"
    )
    return text + ".\n\n" + source(comparison, COMMAND) + "\n"
