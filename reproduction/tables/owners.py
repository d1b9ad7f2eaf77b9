"""The table of PEMA with several owners of a PLM."""

from __future__ import annotations

from pema.evaluation.notation import NOTHING, metric_name, score_text
from reproduction.lines import read_runs
from reproduction.paths import RESULTS
from reproduction.tables.markdown import head, row, signature_of, source

FILE, COMMAND = RESULTS / "owners.jsonl", "python -m reproduction.experiments.owners WORK"
LABELS = (
    "SmolLM2 alone",
    "SmolLM2, PEMA, true representations (transformers, bfloat16)",
    "SmolLM2, PEMA, vectors of llama.cpp (Q4_1)",
    "SmolLM2, PEMA, log-probabilities of llama.cpp alone",
    "Gemma, as an API with the top 20 gives it",
    "Gemma, five examples in the prompt",
    "Gemma, PEMA, true representations (transformers, bfloat16)",
    "Gemma by the proxy SmolLM2",
    'Gemma by the proxy SmolLM2, `vocabulary="own"`',
)
METRICS = ("bleu", "slot_errors")


def owners() -> str:
    """Return the table, without lines that were not run."""
    measured = read_runs(FILE)
    lines = {label: measured[label] for label in LABELS if label in measured}
    counts = signature_of(next(iter(lines.values()))).config
    text = "### Other owners of the PLM\n\n"
    text += head(["", "perplexity on dev", *map(metric_name, METRICS)])
    for label, run in lines.items():
        perplexity = f"{run['perplexity']:.2f}" if "perplexity" in run else NOTHING
        text += row([label, perplexity, *(score_text(name, run[name]) for name in METRICS)])
    return (
        text
        + (
            f"\nSmolLM2-135M-Instruct and Gemma 3 270M (pretrained), plain prompts; {counts['train']} texts to learn "
            f"from, {counts['dev']} dev and {counts['test']} test texts of the bundled restaurants; preset `best`, "
            "constant weight 0.9, nothing chosen, one seed. "
        )
        + source(signature_of(next(iter(lines.values()))), COMMAND)
    )
