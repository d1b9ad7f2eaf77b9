"""The tables of SmolLM2 adapted from log-probabilities that are rounded, or of the likeliest k tokens."""

from __future__ import annotations

from statistics import mean, stdev
from typing import Any

from pema.evaluation.notation import NOTHING
from reproduction.lines import read_runs
from reproduction.paths import RESULTS
from reproduction.tables.markdown import head, row, signature_of, source

FILE, COMMAND = RESULTS / "rounding.jsonl", "python -m reproduction.experiments.rounding WORK"
TRUE = "transformers"
EXACT = "float32"
ROUNDINGS = (EXACT, "4 decimals", "2 decimals")
"""How log-probabilities are rounded, names in `log_probabilities.ROUNDINGS`."""

LINES: tuple[tuple[str, int | None], ...] = (
    (EXACT, None),
    (TRUE, None),
    ("2 decimals", None),
    (EXACT, 866),
    ("2 decimals", 866),
    ("2 decimals", 578),
    (EXACT, 578),
    (EXACT, 432),
    (EXACT, 288),
    ("4 decimals", None),
    ("4 decimals", 578),
    ("2 decimals", 634),
)
"""Roundings and numbers of likeliest tokens, in the order in which they are run; None: 1.5 (d + 1) chosen tokens."""


def label(rounding: str, k: int | None) -> str:
    """Return the name of a line."""
    return rounding if rounding == TRUE else f"{rounding}, {'chosen' if k is None else f'k = {k}'}"


def rounding() -> str:
    """Return a table of the recoveries, and one of the adapters."""
    runs = read_runs(FILE)
    text = "SmolLM2-135M (Q4_1; d = 576, V = 49,152) through llama.cpp's server:\n\n"
    text += head(["log-probabilities", "gap", "requests", "deviation", "largest error"])
    for name in (name for name in ROUNDINGS if name in runs):
        run = runs[name]
        text += row([name, f"{run['gap']:,.1f}", f"{run['queries']:,}", share(run["deviation"]), error(run)])
    seeds = max(len(run["perplexities"]) for run in runs.values() if "perplexities" in run)
    text += "\n" + head(
        ["f from", "log-probabilities", "deviation", "PLM alone", *(f"PEMA, seed {i}" for i in range(seeds)), "mean"]
    )
    true = runs[label(TRUE, None)]
    text += row(["transformers, bfloat16", NOTHING, *_figures(true, seeds)])
    for rounded, k in sorted((line for line in LINES if line[0] != TRUE), key=_order):
        if label(rounded, k) in runs:
            tokens = "866 chosen tokens" if k is None else f"the {k} likeliest tokens"
            text += row([tokens, rounded, *_figures(runs[label(rounded, k)], seeds)])
    config = signature_of(true).config
    return (
        text
        + (
            f"\nPerplexity of the targets of {config['dev']} dev texts ({true['dev_pairs']:,} contexts), "
            f"{config['train']} texts to learn from ({true['pairs']:,} contexts), preset `best`, constant weight 0.9, "
            "plain prompts; mean and standard deviation over seeds of training. "
        )
        + source(signature_of(true), COMMAND)
    )


def share(value: float) -> str:
    """Return a deviation as a percentage."""
    return f"{100 * value:.2g} %"


def error(run: dict[str, Any]) -> str:
    """Return the largest error of a log-probability."""
    return f"{run['largest_error']:.2g}"


def _order(line: tuple[str, int | None]) -> tuple[int, int]:
    rounded, k = line
    return -(k or 1 << 20), ROUNDINGS.index(rounded)


def _figures(run: dict[str, Any], seeds: int) -> list[str]:
    values = run["perplexities"]
    cells = [f"{value:.2f}" for value in values] + [NOTHING] * (seeds - len(values))
    average = f"{mean(values):.2f} ± {stdev(values):.2f}" if len(values) > 1 else NOTHING
    return [share(run["deviation"]), f"{run['alone']:.2f}", *cells, average]
