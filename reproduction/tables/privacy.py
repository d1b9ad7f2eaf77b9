"""The tables of the masked head and of private training."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from typing import Any

from pema.evaluation.notation import NOTHING, bounds_text, metric_name, score_text
from pema.experiments.formats import seconds
from reproduction.lines import read_runs
from reproduction.paths import RESULTS
from reproduction.tables.markdown import head, row, signature_of, source

MASKED_HEAD, MASKED_HEAD_COMMAND = RESULTS / "masked_head.jsonl", "python -m reproduction.experiments.masked_head DATA"
PRIVATE, PRIVATE_COMMAND = RESULTS / "private.jsonl", "python -m reproduction.experiments.private"
INVERSION, INVERSION_COMMAND = RESULTS / "inversion.jsonl", "python -m reproduction.experiments.inversion"
MEASURES = {
    "held_out_cross_entropy": ("held-out cross-entropy of P_PEMA", "cross_entropy"),
    "test_perplexity_pema": ("test perplexity of P_PEMA", "perplexity"),
    "test_perplexity": ("test perplexity of the mixture", "perplexity"),
    "bleu": (metric_name("bleu"), "bleu"),
    "formality_accuracy": (metric_name("formality_accuracy"), "formality_accuracy"),
}
"""Heading, and metric whose notation is used, by the field of a result."""


def masked_head() -> str:
    """Return tables of adapters' quality with a masked head, and of what it hides."""
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
        text += row([f"masked head, if {known['rows']} true rows are known", f"{known['recovered']:.1%} of the others"])
    text += f"\nOver {disclosed['contexts']:,} contexts no logit changes by more than {disclosed['logits_change']:.1e} "
    text += f"(the largest is {disclosed['largest_logit']:.1f}). "
    return text + source(signature_of(disclosed), MASKED_HEAD_COMMAND) + "\n"


def inversion() -> str:
    """Return a table of what comes back from the representations of a memory."""
    (run,) = read_runs(INVERSION).values()
    text = head(["who has the folder without its token ids", "target tokens that come back"])
    text += row(["and nothing else: the likeliest token after each f, by the stored head", f"{run['head_alone']:.1%}"])
    text += row(["and the PLM, not the prompts", f"{run['prompt_unknown']:.1%}"])
    text += row(["and the PLM and the prompts", f"{run['prompt_known']:.1%}"])
    text += f"\n{run['examples']} descriptions of restaurants, {run['tokens']} tokens, stored as {run['dtype']}. "
    text += f"With the prompts, {run['whole_texts']} of {run['examples']} texts come back without a fault. "
    text += f"Of {run['sources']} sources, the nearest to the first f of an example is its own for "
    text += f"{run['sources_identified']} of {run['examples']}. "
    one = run["texts"][0]
    text += source(signature_of(run), INVERSION_COMMAND) + "\n"
    return text + "".join(
        f"- {title}: {one[name].strip()!r}\n"
        for title, name in (("target", "target"), ("without the prompt", "prompt_unknown"))
    )


def _masked_adapters(data: str, runs: list[dict[str, Any]]) -> str:
    text = f"Adapters on {data} (teacher contexts, fitted schedule, embedded PLM):\n\n"
    text += head(["preset", "head", *(title for title, _ in MEASURES.values())])
    names = {
        "residual": ("residual", "best"),
        "paper": ("paper",),
    }  # `best` is the name of `residual` in earlier results
    for preset, called in names.items():
        for kind in ("plain", "masked"):
            some = [r for r in runs if r["signature"]["config"]["preset"] in called and r["head"] == kind]
            cells = []
            for name, (_, metric) in MEASURES.items():
                values = [run[name] for run in some]
                spread = f" ± {score_text(metric, statistics.stdev(values))}" if len(values) > 1 else ""
                cells.append(f"{score_text(metric, statistics.fmean(values))}{spread}")
            text += row([preset, kind, *cells])
    text += f"\nMean and standard deviation over {len(some)} seeds, each with its own mask; nats per token. "
    return text + source(signature_of(some[0]), MASKED_HEAD_COMMAND) + "\n"


def private() -> str:
    """Return a table of quality under privacy, and of the audit of members."""
    metrics, kinds = ("dev_perplexity", "bleu", "chrf", "formality_accuracy"), ("loss", "plm", "references")
    text = head(["", "sigma", *map(metric_name, metrics), "training"])
    attacks = head(["AUC (95 % interval)", *kinds, "largest allowed", "TPR of references"])
    run: Mapping[str, Any] = {}
    for run in read_runs(PRIVATE).values():
        training, audited = run.get("training", {}), run.get("audit", {})
        label = {"plm": "PLM alone", "none": "no privacy"}.get(run["name"], f"epsilon {training.get('epsilon', 0):.2f}")
        sigma = f"{training['noise_multiplier']:.2f}" if "noise_multiplier" in training else NOTHING
        scores = [score_text(name, run[name]) for name in metrics]
        text += row([label, sigma, *scores, seconds(training.get("train_seconds"))])
        if audited:
            results = audited["attacks"]
            cells = [_interval("auc", results[kind]) for kind in kinds]
            bound = score_text("auc", audited.get("auc_bound", 1.0))
            attacks += row([label, *cells, bound, _interval("tpr", results["references"])])
    return text + "\n" + attacks + "\n" + source(signature_of(run), PRIVATE_COMMAND)


def _interval(figure: str, attack: Mapping[str, Any]) -> str:
    return f"{score_text(figure, attack[figure])} ({bounds_text(figure, *attack[f'{figure}_interval'])})"
