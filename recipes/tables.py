"""Write the figures of README and docs from the committed result files.

python -m recipes.tables          rewrite the block between the markers
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any

from benchmarks import paper_table

from pema.experiments.layout import COMPARISON
from pema.files import read_json, writing
from recipes.comparison_tables import comparison, comparisons, row, score_text, source, summary
from recipes.study_results import read_results

ROOT = Path(__file__).parent.parent
RESULTS, BENCHMARKS = ROOT / "results", ROOT / "benchmarks" / "results"
PAPER_SHAPE = BENCHMARKS / "paper_shape.json"
BEGIN, END = "<!-- begin results -->\n", "<!-- end results -->\n"


def demo() -> str:
    """The demo's table."""
    found = read_json(RESULTS / "demo.json")
    names = {"bleu": "BLEU", "chrf": "chrF", "formality_accuracy": "formality accuracy"}
    text = "### The demo\n\n500 customer-support pairs; 120 test sentences that share no template with them.\n\n"
    text += row(["", *names.values(), "peak memory (MB)", "training (s)", "disk (MB)"]) + row(["---"] * 7)
    for run in found["runs"]:
        costs = run["costs"]
        cells = [score_text(name, run["scores"][name]["value"]) for name in names]
        made = [
            f"{costs['train_peak_bytes'] / 1e6:.0f}",
            f"{costs['train_seconds']:.0f}",
            f"{costs['disk_bytes'] / 1e6:.1f}",
        ]
        text += row([run["label"], *cells, *(made if costs["trainable_parameters"] else ["-"] * 3)])
    text += "\nPaired bootstrap (1,000 resamples), best with teacher contexts against the PLM alone: "
    text += "; ".join(
        f"{names[c['metric']]} {c['difference']:+.2f} (95 % interval {c['low']:+.2f} to {c['high']:+.2f}, p "
        f"{c['p_value']:.3f})"
        for c in found["differences"]
        if c["label"] == "PEMA best, teacher"
    )
    return text + ".\n\n" + source(found, "pema demo --json results/demo.json") + "\n"


def benchmarks() -> str:
    """What each benchmark measured against its floor, and whether the aim was met."""
    text = "### Benchmarks\n\n" + row(["benchmark", "measured", "value", "against", "ratio", "aim", "met"])
    text += row(["---"] * 7)
    found: dict[str, Any] = {}
    for file in sorted(set(BENCHMARKS.rglob("*.json")) - {PAPER_SHAPE}):
        found = read_json(file)
        name = found["benchmark"]
        if name == "reconstruction":
            name += f", {found['memory']['pairs']:,} pairs of d {found['memory']['d']}"
        for s in found["summary"]:
            met = {True: "yes", False: "no", None: ""}[s["met"]]
            value = f"{s['value']:,g} {s['unit']}"
            text += row([name, s["what"], value, s["against"], f"{s['ratio']:,g}", s["aim"], met])
    text += "\nMedians; where the rest goes and the peak memory of each are in `benchmarks/results/`. "
    settings = found["signature"]["config"]
    command = f"python -m benchmarks --repeats {settings['repeats']} --sgd-seconds {settings['sgd_seconds']:g}"
    return text + source(found, command) + "\n"


def presets() -> str:
    """What dev data said of each candidate for preset `best`."""
    columns = {"bleu": "BLEU", "chrf": "chrF", "formality_accuracy": "M-ACC"}
    text = row(["data (dev)", "candidate", "lambda_max", "perplexity", *columns.values(), "training (s)"])
    text += row(["---"] * 8)
    found: dict[str, Any] = {}
    for folder in sorted(path.parent for path in (RESULTS / "presets").glob(f"*/{COMPARISON}")):
        results = read_results(folder)
        found = dict(results.comparison)
        for line in results.lines:
            (run,) = line.runs
            scores = [score_text(n, run["scores"][n]["value"]) if n in run["scores"] else "-" for n in columns]
            weight = run["settings"].get("lambda_max", "-")
            made = [f"{run['dev_perplexity']:.2f}", *scores, f"{run['costs']['train_seconds']:.0f}"]
            text += row([folder.name, line.label, str(weight), *made])
    return text + "\n" + source(found, "python -m recipes.choose_preset DATA") + "\n"


def masked_head() -> str:
    """What adapters lose by a masked head, and what it hides."""
    text, found = "", {}
    columns = {
        "held_out_cross_entropy": ("held-out cross-entropy of P_PEMA", 3),
        "test_perplexity_pema": ("test perplexity of P_PEMA", 2),
        "test_perplexity": ("test perplexity of the mixture", 2),
        "bleu": ("BLEU", 2),
        "formality_accuracy": ("M-ACC", 3),
    }
    for data in sorted(path for path in (RESULTS / "masked_head").iterdir() if path.is_dir()):
        text += f"Adapters on {data.name} (teacher contexts, fitted schedule, embedded PLM):\n\n"
        text += row(["preset", "head", *(title for title, _ in columns.values())]) + row(["---"] * (2 + len(columns)))
        for preset in ("best", "paper"):
            for head in ("plain", "masked"):
                results = [read_json(file) for file in sorted(data.glob(f"{preset}-seed*-{head}.json"))]
                found = results[0]
                cells = []
                for name, (_, digits) in columns.items():
                    values = [result[name] for result in results]
                    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
                    cells.append(f"{statistics.mean(values):.{digits}f}{spread}")
                text += row([preset, head, *cells])
        seeds = len(list(data.glob("best-seed*-plain.json")))
        text += f"\nMean and standard deviation over {seeds} seeds, each with a mask of its own; nats a token. "
        text += source(found, "python -m recipes.masked_head DATA") + "\n"
    told = read_json(RESULTS / "masked_head" / "disclosure.json")
    text += f"The embedded PLM's tied table ({told['rows']:,} x {told['width']}), rows found by nearest neighbour:\n\n"
    text += row(["released", "rows found"]) + row(["---"] * 2)
    text += row(["plain head", f"{told['recovered_plain']:.1%}"])
    text += row(["masked head", f"{told['recovered_masked']:.3%} (chance {told['chance']:.3%})"])
    for known in told["known"]:
        text += row([f"masked head, to who knows {known['rows']} true rows", f"{known['recovered']:.1%} of the others"])
    text += f"\nOver {told['contexts']:,} contexts no logit moves by more than {told['logits_change']:.1e} "
    return (
        text
        + f"(the greatest is {told['largest_logit']:.1f}). "
        + source(told, "python -m recipes.masked_head DATA")
        + "\n"
    )


def private() -> str:
    """What privacy costs in quality, and what the audit finds of the members."""
    text = row(["", "sigma", "dev perplexity", "BLEU", "chrF", "M-ACC", "training (s)"]) + row(["---"] * 7)
    attacks = row(["AUC (95 % interval)", "loss", "plm", "references", "largest allowed", "TPR of references"])
    attacks += row(["---"] * 6)
    found: dict[str, Any] = {}
    for name in ("plm", "none", "epsilon8", "epsilon3", "epsilon1"):
        file = RESULTS / "private" / f"{name}.seed0.json"
        if not file.exists():
            continue
        found = read_json(file)
        training, audited = found.get("training", {}), found.get("audit", {})
        label = {"plm": "PLM alone", "none": "no privacy"}.get(name, f"epsilon {training.get('epsilon', 0):.2f}")
        sigma = f"{training['noise_multiplier']:.2f}" if "noise_multiplier" in training else "-"
        scores = [f"{found['dev_perplexity']:.2f}", f"{found['bleu']:.1f}", f"{found['chrf']:.1f}"]
        seconds = f"{training['train_seconds']:.0f}" if training else "-"
        text += row([label, sigma, *scores, f"{found['formality_accuracy']:.2f}", seconds])
        if audited:
            kinds = [audited["attacks"][kind] for kind in ("loss", "plm", "references")]
            cells = [f"{a['auc']:.2f} ({a['auc_interval'][0]:.2f} to {a['auc_interval'][1]:.2f})" for a in kinds]
            bound = f"{audited['auc_bound']:.2f}" if "auc_bound" in audited else "1"
            low, high = kinds[-1]["tpr_interval"]
            attacks += row([label, *cells, bound, f"{kinds[-1]['tpr']:.3f} ({low:.3f} to {high:.3f})"])
    return text + "\n" + attacks + "\n" + (source(found, "python -m recipes.private") if found else "")


def paper() -> str:
    """What was run of the paper's experiments: the WMT22 slice, with small PLMs."""
    return comparison(RESULTS / "compare" / "wmt22") + comparison(RESULTS / "compare" / "wmt22-14m")


def paper_shape() -> str:
    """Memory and time at the paper's shape."""
    return paper_table.page(read_json(PAPER_SHAPE))


def results() -> str:
    """The README's figures."""
    return demo() + summary() + benchmarks()


BLOCKS = {
    ROOT / "README.md": results,
    ROOT / "docs" / "results.md": comparisons,
    ROOT / "docs" / "presets.md": presets,
    ROOT / "docs" / "masked-head.md": masked_head,
    ROOT / "docs" / "paper.md": paper,
    ROOT / "docs" / "paper-shape.md": paper_shape,
    ROOT / "docs" / "private-training.md": private,
}


def parts_of(page: Path) -> tuple[str, str, str]:
    """What stands before, between and behind the markers of a page."""
    before, rest = page.read_text(encoding="utf-8").split(BEGIN)
    current, after = rest.split(END)
    return before, current, after


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    for page, made in BLOCKS.items():
        before, _, after = parts_of(page)
        with writing(page) as partial:
            partial.write_text(before + BEGIN + made() + END + after, encoding="utf-8")


if __name__ == "__main__":
    main()
