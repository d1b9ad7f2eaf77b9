"""The table of what was tried on top of preset `best`."""

from __future__ import annotations

from typing import Any

from reproduction.lines import read_runs
from reproduction.paths import DOCS, RESULTS
from reproduction.tables.markdown import head, row, signature_of, source

FILE, PAGE = RESULTS / "refinements.jsonl", DOCS / "studies" / "refinements.md"
COMMAND = "python -m reproduction.experiments.refinements DATA"
SETS = {"webnlg-seen": "WebNLG", "nl2bash": "NL2Bash"}
SINGLE = ("seed 0", "seed 1", "seed 2")
ENSEMBLE, SMOOTHED, NEIGHBOURS = "three seeds merged", "label smoothing of 0.1", "kNN-LM's distribution mixed in"
DECODING: dict[str, dict[str, Any]] = {
    "`repetition_penalty=1.1`": {"repetition_penalty": 1.1},
    "`repetition_penalty=1.2`": {"repetition_penalty": 1.2},
    "`no_repeat_ngram_size=4`": {"no_repeat_ngram_size": 4},
    "`no_repeat_ngram_size=6`": {"no_repeat_ngram_size": 6},
}
"""Settings of generation, by their names in the table."""


def refinements() -> str:
    """Return the table of both data sets."""
    runs = read_runs(FILE)
    text = "SmolLM2-135M-Instruct, 1,000 texts, 50 dev texts, weight 1, greedy:\n\n"
    columns = [f"{metric}, {name}" for name in SETS.values() for metric in ("cross-entropy", "BLEU", "chrF", "cut")]
    text += head(["", *columns])
    for name in (*SINGLE, ENSEMBLE, SMOOTHED, NEIGHBOURS, *DECODING):
        text += row([name, *(value for data in SETS for value in _values(runs[f"{data}: {name}"]))])
    return text + "\n" + source(signature_of(next(iter(runs.values()))), COMMAND)


def _values(run: dict[str, Any]) -> list[str]:
    entropy = run.get("held_out_cross_entropy")
    scores = [f"{run['scores'][name]:.1f}" for name in ("bleu", "chrf")]
    return ["" if entropy is None else f"{entropy:.3f}", *scores, f"{run['cut']} of {run['texts']}"]
