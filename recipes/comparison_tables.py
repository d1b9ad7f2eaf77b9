"""The tables of committed comparisons, for README and docs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from pema.experiments.table import NAMES, needs_in_words
from pema.files import read_json

RESULTS = Path(__file__).parent.parent / "results" / "compare"
COSTS = {
    "peak memory (MB)": ("train_peak_bytes", 1e-6, 0),
    "training (s)": ("train_seconds", 1, 0),
    "a token (ms)": ("seconds_per_token", 1e3, 2),
    "disk (MB)": ("disk_bytes", 1e-6, 1),
}


def row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |\n"


def comparisons() -> str:
    """One table a comparison: quality with its significance, costs, and what each method needs."""
    text = ""
    for folder in sorted(path.parent for path in RESULTS.glob("*/comparison.json")):
        about, found = read_json(folder / "experiment.json"), read_json(folder / "comparison.json")
        metrics = list(found["rows"][0]["metrics"])
        parts = ", ".join(f"{about['data'][part]:,} {part}" for part in ("train", "dev", "test"))
        text += f"### {about['title']}\n\n"
        text += row(["", *(NAMES.get(name, name) for name in metrics), *COSTS, "needs"])
        text += row(["---"] * (2 + len(metrics) + len(COSTS)))
        for each in found["rows"]:
            runs = [read_json(folder / f"{name}.json") for name in found["signature"]["config"]["runs"][each["label"]]]
            marks = {d["metric"]: d for d in found["differences"] if d["label"] == each["label"]}
            scores = [score(name, each["metrics"][name], marks.get(name)) for name in metrics]
            text += row([each["label"], *scores, *costs(runs), needs_in_words(runs[0]["needs"])])
        plm, machine = about["plm"], found["signature"]["machine"]
        text += (
            f"\n{plm['name']} ({plm['parameters'] / 1e6:.1f} M parameters), examples: {parts}; mean ± standard "
            f"deviation over {len(about['seeds'])} seeds. **+** and **-**: better and worse than {about['reference']}, "
            f"p < 0.05 (paired bootstrap). Made by `pema compare configs/compare/{about['name']}.toml` on "
            f"{machine['processor']}, {machine['cores']} cores, {machine['cpu_capability']}, "
            f"torch {found['signature']['versions']['torch']}.\n\n"
        )
    return text


def score_text(name: str, value: float) -> str:
    """A score with the digits that its scale asks for."""
    return f"{value:.2f}" if name in ("formality_accuracy", "accuracy") else f"{value:.1f}"


def score(name: str, interval: Mapping[str, Any], difference: Mapping[str, Any] | None) -> str:
    """Mean, spread, and whether it differs from the reference."""
    text = score_text(name, interval["mean"])
    if interval["std"] is not None:
        text += f" ± {score_text(name, interval['std'])}"
    if difference is not None and difference["significant"]:
        text += " **+**" if difference["difference"] > 0 else " **-**"
    return text


def costs(runs: Sequence[Mapping[str, Any]]) -> list[str]:
    """Means over the runs; what no training has is left out."""
    trained = any(run["costs"]["train_seconds"] for run in runs)
    found = []
    for name, unit, digits in COSTS.values():
        of_training = name != "seconds_per_token"
        mean = fmean(run["costs"][name] for run in runs) * unit
        found.append("-" if of_training and not trained else f"{mean:.{digits}f}")
    return found
