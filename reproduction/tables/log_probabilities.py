"""The table of the recovery of an LM head from rounded log-probabilities."""

from __future__ import annotations

from reproduction.lines import read_runs
from reproduction.paths import RESULTS
from reproduction.tables.markdown import head, row, signature_of, source

FILE, COMMAND = RESULTS / "log_probabilities.jsonl", "python -m reproduction.experiments.log_probabilities"
ROUNDINGS = ("float32", "4 decimals", "2 decimals", "1 decimal", "bfloat16")


def log_probabilities() -> str:
    """Return a table of the recovery, and of f from the likeliest tokens, for each rounding."""
    runs = read_runs(FILE)
    likeliest = [*next(run["likeliest"] for run in runs.values() if run["likeliest"])]
    text = head(
        ["log-probabilities", "d", "gap", "requests", "deviation", "largest error", *(f"k = {k}" for k in likeliest)]
    )
    for name, run in ((name, runs[name]) for name in ROUNDINGS if name in runs):
        if "refused" in run:
            text += row([name, "refused", *[""] * (4 + len(likeliest))])
            continue
        cells = [name, str(run["d"]), f"{run['gap']:,.1f}", f"{run['queries']:,}"]
        cells += [_share(run["deviation"]), f"{run['largest_error']:.2g}"]
        text += row([*cells, *(_share(run["likeliest"][k]) for k in likeliest)])
    return text + "\n" + source(signature_of(next(iter(runs.values()))), COMMAND)


def _share(value: float) -> str:
    return f"{100 * value:.2g} %"
