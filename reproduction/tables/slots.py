"""The table of errors by slot on E2E NLG."""

from __future__ import annotations

from pema.evaluation.slots import PLACES
from reproduction.lines import read_runs
from reproduction.paths import RESULTS
from reproduction.tables.markdown import head, row, signature_of, source

FILE, COMMAND = RESULTS / "slots.jsonl", "python -m reproduction.experiments.slots DATA"


def slots() -> str:
    """Return a table of what is left out and what is said falsely of each slot, by method."""
    runs = read_runs(FILE)
    first = next(iter(runs.values()))
    names = [PLACES, *(slot for slot in first["slots"] if slot != PLACES)]
    text = "### E2E NLG: facts left out, and facts said falsely or twice\n\n"
    text += "In percent of the values of each slot, over all seeds, by the patterns of the slot error rate:\n\n"
    text += head(["", *names])
    for label, run in runs.items():
        text += row([label, *(_cell(run["slots"][slot]) for slot in names)])
    return text + "\n" + source(signature_of(first), COMMAND)


def _cell(counts: dict[str, int]) -> str:
    """Return the two shares of a slot."""
    missing = counts.get("missing", 0)
    false = sum(n for kind, n in counts.items() if kind not in ("values", "missing"))
    return f"{100 * missing / counts['values']:.1f} + {100 * false / counts['values']:.1f}"
