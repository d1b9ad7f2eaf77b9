"""Errors of the texts of the comparison on E2E NLG, slot by slot.

    python -m reproduction.experiments.slots DATA

Reads the committed texts, and the records of the test set from DATA, the folder of `python -m reproduction.data.real`.
"""

from __future__ import annotations

import argparse
from collections import Counter
from pathlib import Path
from typing import Any

from pema.evaluation.slots import NAME, NEAR, PLACES, errors_by_slot, record
from pema.signature import signature
from reproduction.lines import RUN, TEXTS, read_lines, read_runs, write_lines
from reproduction.paths import RESULTS

COMPARISON, FILE = "e2e-nlg-2-texts", RESULTS / "slots.jsonl"


def count(texts: list[str], records: list[dict[str, str]]) -> dict[str, Counter[str]]:
    """Return the number of values of each slot, and the errors about it by kind, over texts and their records."""
    totals: dict[str, Counter[str]] = {}
    for text, slots in zip(texts, records, strict=True):
        for slot in slots:
            totals.setdefault(PLACES if slot in (NAME, NEAR) else slot, Counter())["values"] += 1
        for slot, errors in errors_by_slot(text, slots).items():
            totals.setdefault(slot, Counter()).update(errors)
    return totals


def lines(runs: dict[str, dict[str, Any]], records: list[dict[str, str]]) -> list[dict[str, Any]]:
    """Return a line for each method: its counts, summed over seeds."""
    methods: dict[str, dict[str, Counter[str]]] = {}
    seeds: Counter[str] = Counter()
    for run in runs.values():
        seeds[run["label"]] += 1
        totals = methods.setdefault(run["label"], {})
        for slot, counts in count(run[TEXTS], records).items():
            totals.setdefault(slot, Counter()).update(counts)
    return [
        {
            RUN: label,
            "seeds": seeds[label],
            "slots": {slot: dict(sorted(counts.items())) for slot, counts in sorted(totals.items())},
            "signature": signature({"comparison": COMPARISON, "method": label}, None),
        }
        for label, totals in methods.items()
    ]


def main() -> None:
    """Count the errors of all committed texts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    given = parser.parse_args()
    examples = read_lines(given.data / COMPARISON / "test.jsonl")
    records = [record(one["source"]) for one in examples]
    write_lines(FILE, lines(read_runs(RESULTS / "compare" / f"{COMPARISON}.jsonl"), records))


if __name__ == "__main__":
    main()
