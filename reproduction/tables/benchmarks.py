"""The table of the benchmarks."""

from __future__ import annotations

from reproduction.lines import read_runs
from reproduction.paths import RESULTS
from reproduction.tables.markdown import head, row, signature_of, source

FILE = RESULTS / "benchmarks.jsonl"


def command() -> str:
    """Return the command that produced the results, from their signature."""
    (*_, run) = read_runs(FILE).values()
    settings = run["signature"]["config"]
    return (
        f"python -m reproduction.benchmarks --repeats {settings['repeats']} --sgd-seconds {settings['sgd_seconds']:g}"
    )


def benchmarks() -> str:
    """Return a table of each benchmark against its lower bound, and whether the aim was met."""
    text = head(["benchmark", "measured", "value", "against", "ratio", "aim", "met"])
    runs = list(read_runs(FILE).values())
    for run in runs:
        name = run["benchmark"]
        if name == "reconstruction":
            name += f", {run['memory']['pairs']:,} pairs of d {run['memory']['d']}"
        for line in run["summary"]:
            met = {True: "yes", False: "no", None: ""}[line["met"]]
            value = f"{line['value']:,g} {line['unit']}"
            text += row([name, line["what"], value, line["against"], f"{line['ratio']:,g}", line["aim"], met])
    text += (
        "\nMedians; where the rest goes and the peak memory of each are in `reproduction/results/benchmarks.jsonl`. "
    )
    return text + source(signature_of(runs[-1]), command()) + "\n"
