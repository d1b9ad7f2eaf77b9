"""The table of what was tried on top of preset `best`."""

from __future__ import annotations

from typing import Any

from reproduction.lines import read_runs
from reproduction.paths import DOCS, RESULTS
from reproduction.tables.markdown import head, row, signature_of, source

FILE, PAGE = RESULTS / "refinements.jsonl", DOCS / "studies" / "refinements.md"
COMMAND = "python -m reproduction.experiments.refinements DATA"
DATA = "nl2bash"
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
    """Return the table."""
    runs = read_runs(FILE)
    text = "NL2Bash, SmolLM2-135M-Instruct, 1,000 texts, weight 1; cut: at the token limit, of 50 dev texts:\n\n"
    text += head(["", "cross-entropy (nats)", "BLEU", "chrF", "cut"])
    for name in (*SINGLE, ENSEMBLE, SMOOTHED, NEIGHBOURS, *DECODING):
        text += row([name, *_values(runs[name])])
    return text + "\n" + source(signature_of(next(iter(runs.values()))), COMMAND)


def _values(run: dict[str, Any]) -> list[str]:
    entropy = run.get("held_out_cross_entropy")
    scores = [f"{run['scores'][name]:.1f}" for name in ("bleu", "chrf")]
    return ["" if entropy is None else f"{entropy:.3f}", *scores, str(run["cut"])]
