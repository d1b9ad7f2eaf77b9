"""The table of the vocabularies of training, for a PLM of large V."""

from __future__ import annotations

from reproduction.lines import read_runs
from reproduction.paths import RESULTS
from reproduction.tables.markdown import head, row, signature_of, source

FILE, COMMAND = RESULTS / "vocabulary.jsonl", "python -m reproduction.experiments.vocabulary DATA PLM"
KINDS = ("sampled", "seen", "full")
SETS = ("new names", "known names")


def vocabulary() -> str:
    """Return a table of the cost of training and the quality with each vocabulary."""
    runs = read_runs(FILE)
    columns = [f"{name}, {of}" for of in SETS for name in ("perplexity", "names", "slot errors")]
    text = "On SmolLM2-135M-Instruct, 1,000 E2E texts, constant weight 0.7; `training` is processor time:\n\n"
    text += head(["vocabulary", "training", *columns])
    for kind, run in ((kind, runs[kind]) for kind in KINDS if kind in runs):
        cells = [f"`{kind}`", f"{run['processor_seconds']:.0f} s"]
        for of in SETS:
            scores = run["scores"][of]
            cells += [f"{scores['perplexity']:.2f}", f"{scores['names']:.0%}", f"{scores['slot_errors']:.1f} %"]
        text += row(cells)
    run = next(iter(runs.values()))
    return text + "\n" + source(signature_of(run), COMMAND)
