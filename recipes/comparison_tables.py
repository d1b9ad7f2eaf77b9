"""The tables of committed comparisons, for README and docs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from pema.experiments.layout import COMPARISON
from pema.experiments.table import NAMES, needs_in_words
from recipes.study_results import read_results

RESULTS = Path(__file__).parent.parent / "results" / "compare"
COSTS = {
    "peak memory (MB)": ("train_peak_bytes", 1e-6, 0),
    "training (s)": ("train_seconds", 1, 0),
    "a token (ms)": ("seconds_per_token", 1e3, 2),
    "disk (MB)": ("disk_bytes", 1e-6, 1),
}
SUMMARISED = ("bleu", "formality_accuracy")
SHORT = ("peak memory (MB)", "training (s)")


def row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |\n"


def source(result: Mapping[str, Any], command: str) -> str:
    """Which command made a result, on which machine."""
    signature = result["signature"]
    machine = signature["machine"]
    where = f"{machine['processor']}, {machine['cores']} cores, {machine['cpu_capability']}"
    return f"Made by `{command}` on {where}, torch {signature['versions']['torch']}.\n"


def folders() -> list[Path]:
    """The folders of the committed comparisons."""
    return sorted(path.parent for path in RESULTS.glob(f"*/{COMPARISON}"))


def comparisons() -> str:
    """The tables of all of them."""
    return "".join(comparison(folder) for folder in folders())


def comparison(folder: Path) -> str:
    """One table: quality with its significance, costs, and what each method needs."""
    results = read_results(folder)
    about, found = results.experiment, results.comparison
    parts = ", ".join(f"{about['data'][part]:,} {part}" for part in ("train", "dev", "test"))
    text = f"### {about['title']}\n\n"
    text += row(["", *(NAMES.get(name, name) for name in results.metrics), *COSTS, "needs"])
    text += row(["---"] * (2 + len(results.metrics) + len(COSTS)))
    for each, line in zip(found["rows"], results.lines, strict=True):
        scores = [score(name, each["metrics"][name], line.marks.get(name)) for name in results.metrics]
        text += row([line.label, *scores, *costs(line.runs), needs_in_words(line.runs[0]["needs"])])
    plm = about["plm"]
    text += (
        f"\n{plm['name']} ({plm['parameters'] / 1e6:.1f} M parameters), examples: {parts}; mean ± standard deviation "
        f"over {len(about['seeds'])} seeds. **+** and **-**: better and worse than {about['reference']}, p < 0.05 "
        "(paired bootstrap). "
    )
    return text + source(found, f"pema compare configs/compare/{about['name']}.toml") + "\n"


def summary() -> str:
    """One table of the embedded PLM: every method on all data sets, its quality and its mean costs."""
    every = [read_results(folder) for folder in folders()]
    every = [results for results in every if len(results.lines) == max(len(each.lines) for each in every)]
    columns = [(results, name) for name in SUMMARISED for results in every if name in results.metrics]
    text = "### Methods side by side\n\n"
    text += row(
        ["", *(f"{NAMES[name]}, {results.experiment['data']['name']}" for results, name in columns), *SHORT, "needs"]
    )
    text += row(["---"] * (2 + len(columns) + len(SHORT)))
    for lines in zip(*(results.lines for results in every), strict=True):
        cells = []
        for results, name in columns:
            at = every.index(results)
            each = next(each for each in results.comparison["rows"] if each["label"] == lines[at].label)
            cells.append(score(name, each["metrics"][name] | {"std": None}, lines[at].marks.get(name)))
        paid = costs([run for line in lines for run in line.runs])
        shown = [cost for cost, name in zip(paid, COSTS, strict=True) if name in SHORT]
        text += row([lines[0].label, *cells, *shown, needs_in_words(lines[0].runs[0]["needs"])])
    plm = every[0].experiment["plm"]
    names = ",".join(results.experiment["name"] for results in every)
    return text + (
        f"\n{plm['name']} ({plm['parameters'] / 1e6:.1f} M parameters), means over {len(every[0].experiment['seeds'])} "
        f"seeds; costs are means over the data sets too. **+** and **-**: better and worse than "
        f"{every[0].experiment['reference']}, p < 0.05 (paired bootstrap). Spreads and sizes are in docs/results.md. "
        + source(every[0].comparison, f"pema compare configs/compare/{{{names}}}.toml")
        + "\n"
    )


def score_text(name: str, value: float) -> str:
    """A score with the digits that its scale asks for."""
    return f"{value:.2f}" if name in ("formality_accuracy", "accuracy") else f"{value:.1f}"


def score(name: str, interval: Mapping[str, Any], mark: str | None) -> str:
    """Mean, spread, and whether it differs from the reference."""
    text = score_text(name, interval["mean"])
    if interval["std"] is not None:
        text += f" ± {score_text(name, interval['std'])}"
    return text if mark is None else f"{text} **{mark}**"


def costs(runs: Sequence[Mapping[str, Any]]) -> list[str]:
    """Means over the runs; what no training has is left out."""
    trained = any(run["costs"]["train_seconds"] for run in runs)
    found = []
    for name, unit, digits in COSTS.values():
        of_training = name != "seconds_per_token"
        mean = fmean(run["costs"][name] for run in runs) * unit
        found.append("-" if of_training and not trained else f"{mean:.{digits}f}")
    return found
