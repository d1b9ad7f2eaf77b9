"""Write the figures of README and docs from the committed result files.

python -m recipes.tables          rewrite the block between the markers
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any

from benchmarks import paper_table

from pema.experiments.setting import Setting
from pema.files import read_json, writing
from recipes.comparison_tables import comparisons, row, score_text

ROOT = Path(__file__).parent.parent
RESULTS, BENCHMARKS = ROOT / "results", ROOT / "benchmarks" / "results"
PAPER_SHAPE = BENCHMARKS / "paper_shape.json"
BEGIN, END = "<!-- begin results -->\n", "<!-- end results -->\n"

LABELS = {
    "PLM alone": lambda seed: Setting(),
    "paper, teacher, Gradual Unrolling": lambda seed: Setting("paper", schedule="unrolling", seed=seed),
    "paper, predicted, Gradual Unrolling": lambda seed: Setting("paper", "predicted", schedule="unrolling", seed=seed),
    "paper, teacher, constant": lambda seed: Setting("paper", schedule="constant", seed=seed),
    "paper, teacher, linear": lambda seed: Setting("paper", schedule="linear", seed=seed),
    "paper, teacher, fitted": lambda seed: Setting("paper", schedule="fitted", seed=seed),
    "best, teacher, Gradual Unrolling": lambda seed: Setting("best", schedule="unrolling", seed=seed),
    "best, teacher, constant": lambda seed: Setting("best", schedule="constant", seed=seed),
    "best, teacher, linear": lambda seed: Setting("best", schedule="linear", seed=seed),
    "best, teacher, fitted": lambda seed: Setting("best", schedule="fitted", seed=seed),
    "best, predicted (position), Gradual Unrolling": lambda seed: Setting(
        "best", "predicted", "position", schedule="unrolling", seed=seed
    ),
    "best, predicted (aligned), Gradual Unrolling": lambda seed: Setting(
        "best", "predicted", "aligned", schedule="unrolling", seed=seed
    ),
    "best, predicted (position), fitted": lambda seed: Setting("best", "predicted", "position", seed=seed),
    "best, predicted (aligned), fitted": lambda seed: Setting("best", "predicted", "aligned", seed=seed),
}


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


def real_input() -> str:
    """One table a PLM: every setting on every data set, the mean and the spread over seeds."""
    text = ""
    for plm in sorted(path for path in (RESULTS / "real_input").iterdir() if path.is_dir()):
        folders = sorted(path for path in plm.iterdir() if path.is_dir())
        parameters = read_json(folders[0] / "plm.test.json")["signature"]["config"]["plm"]["parameters"]
        text += f"### Real input, {plm.name} ({parameters / 1e6:.1f} M parameters)\n\n"
        columns = [(f, "bleu") for f in folders]
        columns += [
            (f, "formality_accuracy") for f in folders if "formality_accuracy" in read_json(f / "plm.test.json")
        ]
        titles = [f"{f.name} {'BLEU' if metric == 'bleu' else 'M-ACC'}" for f, metric in columns]
        text += row(["", *titles]) + row(["---"] * (1 + len(columns)))
        for label, setting in LABELS.items():
            cells = [cell(folder, metric, setting) for folder, metric in columns]
            if any(each != "-" for each in cells):
                text += row([label, *cells])
        text += "\nMean over seeds, with the standard deviation where there are several. "
        text += source(read_json(folders[0] / "plm.test.json"), f"python -m recipes.real_input DATA --plm {plm.name}")
        text += "\n" + significant(folders)
    return text


def cell(folder: Path, metric: str, setting: Any) -> str:
    """The mean of a metric over the seeds that are there."""
    files = {folder / f"{setting(seed).key}.test.json" for seed in range(10)}
    values = [read_json(file)[metric] for file in sorted(files) if file.exists()]
    if not values:
        return "-"
    digits = 2 if metric == "formality_accuracy" else 1
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{spread}"


def significant(folders: list[Path]) -> str:
    """What the paired bootstrap says of the presets, seed 0."""
    paper, best = Setting("paper", schedule="unrolling").key, Setting("best").key
    predicted = Setting("best", "predicted", "aligned", schedule="unrolling").key
    names = {"plm": "PLM alone", paper: "paper", best: "best", predicted: "best, predicted"}
    text = "Paired bootstrap (1,000 resamples, seed 0, teacher contexts unless it says predicted, 95 % interval of the "
    text += "difference):\n\n"
    text += row(["data", "comparison", "metric", "difference", "interval", "p"]) + row(["---"] * 6)
    for folder in folders:
        for c in read_json(folder / "significance.json")["comparisons"]:
            if c["baseline"] in names and c["system"] in names:
                digits, found = 1 if c["metric"] == "bleu" else 2, c["found"]
                comparison = f"{names[c['system']]} against {names[c['baseline']]}"
                interval = f"{found['low']:+.{digits}f} to {found['high']:+.{digits}f}"
                metric = "BLEU" if c["metric"] == "bleu" else "M-ACC"
                cells = [folder.name, comparison, metric, f"{found['difference']:+.{digits}f}", interval]
                text += row([*cells, f"{found['p_value']:.3f}"])
    return text + "\n"


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


def source(result: dict[str, Any], command: str) -> str:
    """Which command made a result, on which machine and commit."""
    signature = result["signature"]
    machine = signature["machine"]
    where = f"{machine['processor']}, {machine['cores']} cores, {machine['cpu_capability']}"
    return f"Made by `{command}` on {where}, torch {signature['versions']['torch']}.\n"


def presets() -> str:
    """What dev data said of each candidate for preset `best`."""
    text = ""
    for file in sorted((RESULTS / "presets").glob("*.json")):
        found = read_json(file)
        text += row(["data (dev)", "candidate", "perplexity", "BLEU", "chrF", "M-ACC", "training (s)"]) + row(
            ["---"] * 7
        )
        for r in found["rows"]:
            formality = f"{r['formality_accuracy']:.2f}" if "formality_accuracy" in r else "-"
            scores = [f"{r['dev_perplexity']:.2f}", f"{r['bleu']:.1f}", f"{r['chrf']:.1f}", formality]
            text += row([r["data"], r["candidate"], *scores, f"{r['train_seconds']:.0f}"])
        text += (
            f"\nPLM: {file.stem}. " + source(found, f"python -m recipes.choose_preset DATA --plm {file.stem}") + "\n"
        )
    return text


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
    wanted = (
        "PLM alone",
        "paper, predicted, Gradual Unrolling",
        "paper, teacher, Gradual Unrolling",
        "best, teacher, Gradual Unrolling",
    )
    folders = sorted((RESULTS / "real_input").glob("*/wmt22"))
    alone = [read_json(folder / "plm.test.json") for folder in folders]
    text = row(["", *(f"{folder.parent.name} {name}" for folder in folders for name in ("BLEU", "chrF"))])
    text += row(["---"] * (1 + 2 * len(folders)))
    for label in wanted:
        cells = [cell(folder, metric, LABELS[label]) for folder in folders for metric in ("bleu", "chrf")]
        text += row([label, *cells])
    sizes = [f"{found['signature']['config']['plm']['parameters'] / 1e6:.1f} M parameters" for found in alone]
    text += "\n" + "; ".join(f"{folder.parent.name}: {size}" for folder, size in zip(folders, sizes, strict=True))
    text += ". Mean and standard deviation over the seeds of training. "
    return text + source(alone[0], "python -m recipes.real_input DATA --only wmt22 --plm PLM") + "\n"


def paper_shape() -> str:
    """Memory and time at the paper's shape."""
    return paper_table.page(read_json(PAPER_SHAPE))


def results() -> str:
    """The README's figures."""
    return demo() + comparisons() + benchmarks()


BLOCKS = {
    ROOT / "README.md": results,
    ROOT / "docs" / "results.md": real_input,
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
