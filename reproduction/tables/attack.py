"""The table of SECURITY.md: attempts, and how many held and fell, before and after."""

from __future__ import annotations

from reproduction.lines import read_runs
from reproduction.paths import RESULTS
from reproduction.tables.markdown import head, row, signature_of, source

FILE, COMMAND = RESULTS / "attack.jsonl", "python -m reproduction.attack --write after"
BEFORE, AFTER = "before", "after"


def attack() -> str:
    """Return a table with one row per attack."""
    runs = read_runs(FILE)
    before, after = runs[BEFORE], runs[AFTER]
    text = head(["tried", "held", "fell", f"before (commit {before['commit'][:7]})", "after"])
    for name, now in after["results"].items():
        earlier = before["results"].get(name, {"figures": "not tried"})
        text += row([name, str(now["held"]), str(now["fell"]), earlier["figures"], now["figures"]])
    return text + "\n" + source(signature_of(after), COMMAND)
