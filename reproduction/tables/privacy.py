"""The tables of the masked head and of private training."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from typing import Any

from reproduction.lines import read_runs
from reproduction.paths import RESULTS
from reproduction.tables.markdown import head, row, source

MASKED_HEAD, MASKED_HEAD_COMMAND = RESULTS / "masked_head.jsonl", "python -m reproduction.experiments.masked_head DATA"
PRIVATE, PRIVATE_COMMAND = RESULTS / "private.jsonl", "python -m reproduction.experiments.private"
MEASURES = {
    "held_out_cross_entropy": ("held-out cross-entropy of P_PEMA", 3),
    "test_perplexity_pema": ("test perplexity of P_PEMA", 2),
    "test_perplexity": ("test perplexity of the mixture", 2),
    "bleu": ("BLEU", 2),
    "formality_accuracy": ("M-ACC", 3),
}


def masked_head() -> str:
    """What adapters lose by a masked head, and what it hides."""
    runs = read_runs(MASKED_HEAD)
    disclosed = runs.pop("disclosure")
    text = "".join(
        _masked_adapters(data, [run for run in runs.values() if run["data"] == data])
        for data in sorted({run["data"] for run in runs.values()})
    )
    rows, width = disclosed["rows"], disclosed["width"]
    text += f"The embedded PLM's tied table ({rows:,} x {width}), rows found by nearest neighbour:\n\n"
    text += head(["released", "rows found"])
    text += row(["plain head", f"{disclosed['recovered_plain']:.1%}"])
    text += row(["masked head", f"{disclosed['recovered_masked']:.3%} (chance {disclosed['chance']:.3%})"])
    for known in disclosed["known"]:
        text += row([f"masked head, to who knows {known['rows']} true rows", f"{known['recovered']:.1%} of the others"])
    text += f"\nOver {disclosed['contexts']:,} contexts no logit moves by more than {disclosed['logits_change']:.1e} "
    text += f"(the greatest is {disclosed['largest_logit']:.1f}). "
    return text + source(disclosed, MASKED_HEAD_COMMAND) + "\n"


def _masked_adapters(data: str, runs: list[dict[str, Any]]) -> str:
    text = f"Adapters on {data} (teacher contexts, fitted schedule, embedded PLM):\n\n"
    text += head(["preset", "head", *(title for title, _ in MEASURES.values())])
    for preset in ("best", "paper"):
        for kind in ("plain", "masked"):
            some = [r for r in runs if r["signature"]["config"]["preset"] == preset and r["head"] == kind]
            cells = []
            for name, (_, digits) in MEASURES.items():
                values = [run[name] for run in some]
                spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
                cells.append(f"{statistics.mean(values):.{digits}f}{spread}")
            text += row([preset, kind, *cells])
    text += f"\nMean and standard deviation over {len(some)} seeds, each with a mask of its own; nats a token. "
    return text + source(some[0], MASKED_HEAD_COMMAND) + "\n"


def private() -> str:
    """What privacy costs in quality, and what the audit finds of the members."""
    text = head(["", "sigma", "dev perplexity", "BLEU", "chrF", "M-ACC", "training (s)"])
    attacks = head(["AUC (95 % interval)", "loss", "plm", "references", "largest allowed", "TPR of references"])
    run: Mapping[str, Any] = {}
    for run in read_runs(PRIVATE).values():
        training, audited = run.get("training", {}), run.get("audit", {})
        label = {"plm": "PLM alone", "none": "no privacy"}.get(run["name"], f"epsilon {training.get('epsilon', 0):.2f}")
        sigma = f"{training['noise_multiplier']:.2f}" if "noise_multiplier" in training else "-"
        scores = [f"{run['dev_perplexity']:.2f}", f"{run['bleu']:.1f}", f"{run['chrf']:.1f}"]
        seconds = f"{training['train_seconds']:.0f}" if training else "-"
        text += row([label, sigma, *scores, f"{run['formality_accuracy']:.2f}", seconds])
        if audited:
            kinds = [audited["attacks"][kind] for kind in ("loss", "plm", "references")]
            cells = [f"{a['auc']:.2f} ({a['auc_interval'][0]:.2f} to {a['auc_interval'][1]:.2f})" for a in kinds]
            bound = f"{audited['auc_bound']:.2f}" if "auc_bound" in audited else "1"
            low, high = kinds[-1]["tpr_interval"]
            attacks += row([label, *cells, bound, f"{kinds[-1]['tpr']:.3f} ({low:.3f} to {high:.3f})"])
    return text + "\n" + attacks + "\n" + source(run, PRIVATE_COMMAND)
