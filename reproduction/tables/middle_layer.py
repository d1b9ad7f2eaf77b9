"""The table of adapters that read a middle layer of the PLM as well."""

from __future__ import annotations

import math

from reproduction.lines import read_runs
from reproduction.paths import DOCS, RESULTS
from reproduction.tables.comparisons import FOLDER
from reproduction.tables.markdown import head, row, signature_of, source

FILE, PAGE = RESULTS / "middle_layer.jsonl", DOCS / "studies" / "middle-layer.md"
COMMAND = "python -m reproduction.experiments.middle_layer DATA PLM"
KINDS = {
    "`best`": ("best", 30),
    "and f of all positions": ("all positions", 30),
    "and layer 22 of the same position": ("same position", 22),
    "and layer 22 of all positions": ("all positions", 22),
    "and layer 15 of all positions": ("all positions", 15),
}
"""Names of the runs: what the adapter reads, and the layer, of 30."""
COMPARED = {"LoRA, which changes every layer": "lora-seed0", "the PLM": "plm-alone-seed0"}


def middle_layer() -> str:
    """Return a table of held-out cross-entropies, with those of LoRA and the PLM from the comparison."""
    runs = read_runs(FILE)
    text = "WebNLG, SmolLM2-135M-Instruct, 1,000 texts, one seed; mean over the tokens of 50 dev texts, in nats:\n\n"
    text += head(["the adapter reads", "trained parameters", "held out"])
    for name in KINDS:
        text += row([name, f"{runs[name]['parameters'] / 1e6:.1f} M", f"{runs[name]['held_out_cross_entropy']:.3f}"])
    compared = read_runs(FOLDER / "webnlg-seen.jsonl")
    for name, run_name in COMPARED.items():
        text += row([name, "", f"{math.log(compared[run_name]['dev_perplexity']):.3f}"])
    return text + "\n" + source(signature_of(next(iter(runs.values()))), COMMAND)
