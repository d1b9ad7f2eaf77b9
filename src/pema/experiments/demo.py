"""The demo: the embedded PLM learns a company's formal customer-support German, in both context modes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.table import Table

from pema.console import note
from pema.evaluation.evaluate import get_metric
from pema.evaluation.significance import paired_bootstrap
from pema.experiments.adaptation import adapt
from pema.experiments.data import Data, support_data
from pema.experiments.setting import Setting
from pema.owner.local import LocalPLM
from pema.signature import signature
from pema.tasks.readers import read_lines

SETTINGS = {
    "PLM alone": Setting(),
    "PEMA paper, predicted": Setting("paper", contexts="predicted", schedule="unrolling"),
    "PEMA paper, teacher": Setting("paper", contexts="teacher", schedule="unrolling"),
    "PEMA best, predicted": Setting("best", contexts="predicted", targets="aligned", schedule="unrolling"),
    "PEMA best, teacher": Setting("best", contexts="teacher"),
}
BEFORE, AFTER = "PLM alone", "PEMA best, teacher"
COLUMNS = ("bleu", "chrf", "formality_accuracy", "memory_bytes", "train_seconds")


def run_demo(folder: Path, *, seed: int = 0) -> tuple[dict[str, Any], list[dict[str, str]]]:
    """Run every setting of the demo below `folder`.

    Returns:
        The result, `{"rows": [{"name", "bleu", "chrf", "formality_accuracy", "memory_bytes", "train_seconds"}, ...],
        "comparisons": ..., "signature": ...}`, and three test sentences with what each setting made of them. The
        comparisons are paired bootstraps of preset `best` in teacher mode against the PLM alone, one per metric.
    """
    plm = LocalPLM.load("embedded")
    data = support_data()
    rows, outputs = [], {}
    for name, setting in SETTINGS.items():
        note(f"{name} ...")
        seeded = Setting(**{**setting.to_dict(), "seed": seed})
        result = adapt(plm, data, seeded, folder)
        rows.append({"name": name} | {column: result[column] for column in COLUMNS})
        outputs[name] = read_lines(folder / "results" / f"{seeded.key}.test.txt")
    config = {name: setting.to_dict() for name, setting in SETTINGS.items()}
    result = {
        "rows": rows,
        "comparisons": compare(data, outputs),
        "signature": signature(config | {"plm": plm.description.to_dict()}, seed),
    }
    return result, pick_examples(data, outputs)


def compare(data: Data, outputs: dict[str, list[str]]) -> list[dict[str, Any]]:
    """What the paired bootstrap says of the adapted PLM against the PLM alone on the test sentences."""
    references = [example.target for example in data.test]
    comparisons = []
    for name in ("bleu", "chrf", "formality_accuracy"):
        metric = get_metric(name, data.annotated["test"])
        found = paired_bootstrap(metric, outputs[BEFORE], outputs[AFTER], references)
        kept = {field: getattr(found, field) for field in ("difference", "low", "high", "p_value", "signature")}
        comparisons.append({"metric": name, "baseline": BEFORE, "system": AFTER} | kept)
    return comparisons


def pick_examples(data: Data, outputs: dict[str, list[str]], count: int = 3) -> list[dict[str, str]]:
    """The first `count` test sentences on which the adapted output is not the PLM's own."""
    before, after = outputs[BEFORE], outputs[AFTER]
    changed = [i for i in range(len(before)) if before[i] != after[i]]
    return [
        {"source": data.test[i].source, "reference": data.test[i].target}
        | {name: outputs[name][i] for name in (BEFORE, "PEMA paper, teacher", AFTER)}
        for i in changed[:count]
    ]


def show_demo(result: dict[str, Any], examples: list[dict[str, str]]) -> list[Table]:
    """The table and the examples, ready to print."""
    table = Table(title="Customer-support German, test sentences")
    for title in ("", "BLEU", "chrF", "formal (M-ACC)", "memory", "training"):
        table.add_column(title, justify="left" if not title else "right")
    for row in result["rows"]:
        table.add_row(
            row["name"],
            f"{row['bleu']:.1f}",
            f"{row['chrf']:.1f}",
            f"{row['formality_accuracy']:.2f}",
            f"{row['memory_bytes'] / 1e6:.1f} MB" if row["memory_bytes"] else "-",
            f"{row['train_seconds']:.0f} s" if row["train_seconds"] else "-",
        )
    names = {"bleu": "BLEU", "chrf": "chrF", "formality_accuracy": "M-ACC"}
    table.caption = f"{AFTER} against {BEFORE}, 95 % interval: " + "; ".join(
        f"{names[c['metric']]} {c['difference']:+.2f} ({c['low']:+.2f} to {c['high']:+.2f}, p {c['p_value']:.3f})"
        for c in result["comparisons"]
    )
    sides = Table(title="Side by side", show_header=False)
    for example in examples:
        for name, text in example.items():
            sides.add_row(name, text, end_section=text is [*example.values()][-1])
    return [table, sides]
