"""Synthetic results in the format of `pema compare` and `pema sweep`: test data, no number was measured."""

import json
import math
import random
import statistics
from pathlib import Path

from pema.tasks.readers import read_lines

ROOT = Path(__file__).parent.parent
SENTENCES = [
    (source, target.replace("[F]", "").replace("[/F]", ""))
    for source, target, _ in (
        line.split("\t") for line in read_lines(ROOT / "src" / "pema" / "demo_data" / "support_test.tsv")
    )
]
METRICS = ("bleu", "chrf", "formality_accuracy")
# label, method, BLEU, trainable parameters, peak bytes, seconds, seconds a token, disk, weights, targets, gradients
METHODS = (
    ("PLM alone", "zero_shot", 9.3, 0, 0, 0.0, 0.0011, 0, "none", False, False),
    ("kNN-LM", "knn_lm", 14.7, 0, 210e6, 0.0, 0.0042, 118e6, "none", True, False),
    ("LoRA", "lora", 18.0, 294_912, 1_310e6, 265.0, 0.0012, 1.2e6, "all", True, True),
    ("IA3", "ia3", 12.9, 15_360, 1_150e6, 240.0, 0.0012, 0.07e6, "all", True, True),
    ("Prefix tuning", "prefix_tuning", 13.6, 122_880, 1_205e6, 251.0, 0.0013, 0.5e6, "all", True, True),
    ("Full fine-tuning", "fine_tuning", 20.5, 13_983_744, 2_420e6, 140.0, 0.0011, 56e6, "all", True, True),
    ("Offsite-Tuning", "offsite_tuning", 15.4, 1_720_320, 890e6, 190.0, 0.0011, 6.9e6, "some", True, True),
    ("PEMA, paper", "pema", 12.2, 393_216, 96e6, 41.0, 0.0013, 1.6e6, "none", True, False),
    ("PEMA, best", "pema", 16.0, 1_572_864, 118e6, 73.0, 0.0014, 6.3e6, "none", True, False),
)


def signature(config, seed):
    return {
        "config": config,
        "seed": seed,
        "versions": {"python": "3.11.7", "pema": "0.1.0", "torch": "2.13.0+cpu", "sacrebleu": "2.6.0"},
        "commit": "0" * 40,
        "machine": {"platform": "Linux x86_64", "processor": "a made-up processor", "cores": 2, "threads": 1},
        "time": "2026-01-01T00:00:00+00:00",
    }


def write(path, value):
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def output_of(target, quality, dice):
    """The reference with words lost and changed, the more of them the lower the quality."""
    words = []
    for word in target.split():
        luck = dice.random()
        if luck < 0.25 + quality / 40:
            words.append(word)
        elif luck < 0.85:
            words.append(dice.choice(("das", "Ihre", "Bestellung", "nicht", "wird", "können", "der", "Paket")))
    return " ".join(words)


def run_of(label, method, bleu, costs, needs, seed, settings, dice):
    parameters, peak, seconds, per_token, disk = costs
    value = bleu + (dice.gauss(0, 0.35) if parameters else 0)
    epochs = dice.randint(8, 12) if seconds else 0
    low = 4.6 - bleu / 12
    curve = [
        {
            "epoch": epoch,
            "seconds": round(seconds * epoch / epochs, 3),
            "held_out_loss": round(low + 1.6 * math.exp(-epoch / 2.2) + 0.004 * epoch + dice.gauss(0, 0.012), 4),
        }
        for epoch in range(epochs + 1)
        if epochs
    ]
    return {
        "run": "",
        "label": label,
        "method": method,
        "settings": settings,
        "seed": seed,
        "scores": {
            "bleu": {"value": round(value, 4), "signature": "BLEU|nrefs:1|case:mixed|eff:no|tok:13a|version:2.6.0"},
            "chrf": {"value": round(24 + 1.3 * value, 4), "signature": "chrF2|nrefs:1|case:mixed|eff:yes|nc:6|nw:0"},
            "formality_accuracy": {"value": round(value / 25, 4), "signature": "M-ACC|matching:tokens|case:mixed"},
        },
        "dev_perplexity": round(math.exp(low), 3),
        "trials": [
            {"settings": {"learning_rate": rate}, "dev_perplexity": 50 + rate} for rate in (3e-4, 1e-3) if epochs
        ],
        "costs": {
            "trainable_parameters": parameters,
            "prepare_seconds": 1.5,
            "train_seconds": round(seconds * dice.uniform(0.9, 1.1), 3),
            "train_peak_bytes": int(peak * dice.uniform(0.97, 1.03)),
            "seconds_per_token": round(per_token * dice.uniform(0.95, 1.05), 6),
            "generated_tokens": 2345,
            "disk_bytes": int(disk),
        },
        "needs": dict(zip(("weights", "targets_at_owner", "gradients"), needs, strict=True)),
        "curve": curve,
        "signature": signature({"method": method, "settings": settings, "data": "made-up"}, seed),
    }


def compared(runs, reference, dice):
    """`comparison.json` of runs by label."""
    rows, differences = [], []
    for label, found in runs.items():
        metrics = {}
        for metric in METRICS:
            values = [run["scores"][metric]["value"] for run in found]
            mean = statistics.fmean(values)
            std = statistics.stdev(values) if len(values) > 1 else None
            metrics[metric] = {"mean": mean, "std": std, "low": mean * 0.93, "high": mean * 1.08}
        rows.append({"label": label, "seeds": len(found), "metrics": metrics})
    base = next(row for row in rows if row["label"] == reference)
    for row in rows:
        for metric in METRICS:
            if row is base:
                continue
            gap = row["metrics"][metric]["mean"] - base["metrics"][metric]["mean"]
            share = abs(gap) / base["metrics"][metric]["mean"]
            p_value = min(1.0, round(math.exp(-22 * share) * dice.uniform(0.5, 1), 4))
            difference = {"label": row["label"], "reference": reference, "metric": metric, "difference": gap}
            significant = p_value < 0.05
            differences.append(
                difference | {"low": gap * 0.8, "high": gap * 1.2, "p_value": p_value, "significant": significant}
            )
    return {"rows": rows, "differences": differences, "signature": signature({"samples": 1000}, 0)}


def write_experiment(folder, runs, *, kind, title, axes=None, examples=True, reference="PLM alone", count=120):
    folder.mkdir(parents=True)
    dice = random.Random(1)
    for label, found in runs.items():
        for run in found:
            kept = "".join(c if c.isalnum() else "-" for c in label.lower())
            run["run"] = f"{kept}-seed{run['seed']}"
            write(folder / f"{run['run']}.json", run)
            texts = [output_of(target, run["scores"]["bleu"]["value"], dice) for _, target in SENTENCES[:count]]
            (folder / f"{run['run']}.txt").write_text("".join(f"{text}\n" for text in texts), encoding="utf-8")
    write(folder / "comparison.json", compared(runs, reference, dice))
    about = {
        "name": folder.name,
        "title": title,
        "kind": kind,
        "task": "translation",
        "data": {"name": "support", "sha256": "0" * 64, "train": 500, "dev": 61, "test": count},
        "plm": {
            "name": "made-up-14m",
            "architecture": "Llama",
            "d": 384,
            "vocabulary_size": 8192,
            "parameters": 13983744,
        },
        "seeds": [0, 1, 2],
        "metrics": list(METRICS),
        "reference": reference,
        "methods": list(runs),
        "signature": signature({"kind": kind}, 0),
    }
    write(folder / "experiment.json", about if axes is None else about | {"axes": axes})
    if examples:
        rows = [json.dumps({"source": s, "target": t}, ensure_ascii=False) for s, t in SENTENCES[:count]]
        (folder / "examples.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
    return folder


def make_comparison(folder, *, title="Made-up comparison (test data)", **options):
    """Nine methods, three seeds; the PLM alone has one."""
    dice = random.Random(0)
    runs = {
        label: [
            run_of(label, method, bleu, numbers[:5], numbers[5:], seed, {"learning_rate": 1e-3}, dice)
            for seed in range(1 if method == "zero_shot" else 3)
        ]
        for label, method, bleu, *numbers in METHODS
    }
    return write_experiment(folder, runs, kind="compare", title=title, **options)


def make_sweep(folder, *, title="Made-up sweep (test data)", **options):
    """PEMA over rank and learning rate, and the PLM alone, which has neither."""
    dice = random.Random(2)
    axes = {"rank": [16, 64, 256, 1024], "learning_rate": [1e-4, 3e-4, 1e-3]}
    label, method, bleu, *numbers = METHODS[0]
    runs = {label: [run_of(label, method, bleu, numbers[:5], numbers[5:], 0, {}, dice)]}
    for rank in axes["rank"]:
        for rate in axes["learning_rate"]:
            label = f"PEMA, rank={rank}, learning_rate={rate}"
            bleu = 9 + 1.4 * math.log(rank) / math.log(4) - 1.2 * math.log10(rate / 3e-4) ** 2
            costs = (768 * rank, 60e6 + 80e3 * rank, 20 + rank / 12, 0.0013, 3072 * rank)
            settings = {"rank": rank, "learning_rate": rate}
            needs = ("none", True, False)
            runs[label] = [run_of(label, "pema", bleu, costs, needs, seed, settings, dice) for seed in range(3)]
    return write_experiment(folder, runs, kind="sweep", title=title, axes=axes, **options)


if __name__ == "__main__":
    import sys

    make_comparison(Path(sys.argv[1]) / "a-comparison")
    make_sweep(Path(sys.argv[1]) / "b-sweep", examples=False)
