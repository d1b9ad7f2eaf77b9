"""The tables of committed comparisons, for README and docs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from pema.experiments.data import SUPPORT
from pema.experiments.table import NAMES, Differences, by_reference, difference_in_words, needs_in_words
from pema.owner.loading import EMBEDDED_FOLDER
from reproduction.lines import SUFFIX, files
from reproduction.paths import RESULTS
from reproduction.tables.markdown import digits_of, head, row, score_text, source
from reproduction.tables.results import Results, read_results

FOLDER = RESULTS / "compare"
COSTS = {
    "peak memory (MB)": ("train_peak_bytes", 1e-6, 0),
    "training (s)": ("train_seconds", 1, 0),
    "a token (ms)": ("seconds_per_token", 1e3, 2),
    "disk (MB)": ("disk_bytes", 1e-6, 1),
}
SUMMARISED = ("bleu", "formality_accuracy")
SHORT = ("peak memory (MB)", "training (s)")


def command(name: str) -> str:
    """What makes the results of a comparison."""
    return f"pema compare reproduction/configs/compare/{name}.toml"


def comparisons() -> str:
    """The tables of all of them."""
    return "".join(comparison(file.stem) for file in files(FOLDER))


def comparison(name: str) -> str:
    """One table: quality with its significance, costs, and what each method needs."""
    results = read_results(FOLDER / f"{name}{SUFFIX}")
    about = results.experiment
    parts = ", ".join(f"{about['data'][part]:,} {part}" for part in ("train", "dev", "test"))
    text = f"### {about['title']}\n\n"
    text += head(["", *(NAMES.get(name, name) for name in results.metrics), *COSTS, "needs"])
    for each, line in zip(results.comparison["rows"], results.lines, strict=True):
        scores = [score(name, each["metrics"][name], line.marks.get(name)) for name in results.metrics]
        text += row([line.label, *scores, *costs(line.runs), needs_in_words(line.runs[0]["needs"])])
    plm = about["plm"]
    text += (
        f"\n{plm['name']} ({plm['parameters'] / 1e6:.1f} M parameters), examples: {parts}; mean ± standard deviation "
        f"over {len(about['seeds'])} seeds. **+** and **-**: better and worse than {about['reference']}, p < 0.05 "
        "(paired bootstrap). "
    )
    text += source(results.comparison, command(name)) + "\n"
    differences = by_reference(results.comparison)
    further = [reference for reference in differences if reference != about["reference"]]
    return text + "".join(against(results, reference, differences[reference]) for reference in further)


def against(results: Results, reference: str, differences: Differences) -> str:
    """What every line has more than `reference`."""
    text = head([f"less {reference} (95 % interval) p", *(NAMES.get(name, name) for name in results.metrics)])
    for label in dict.fromkeys(label for label, _ in differences):
        text += row(
            [label, *(difference_in_words(differences[label, name], digits_of(name)) for name in results.metrics)]
        )
    return text + "\n"


def summary() -> str:
    """One table of the embedded PLM: every method on all data sets, and what it costs on the data of the demo."""
    every = embedded()
    (shipped,) = [results for results in every if results.experiment["data"]["name"] == SUPPORT]
    columns = [(results, name) for name in SUMMARISED for results in every if name in results.metrics]
    titles = [f"{NAMES[name]}, {results.experiment['data']['name']}" for results, name in columns]
    text = "### Methods side by side\n\n" + head(["", *titles, *SHORT, "needs"])
    for line in shipped.lines:
        cells = [cell(results, line.label, name) for results, name in columns]
        paid = [cost for cost, name in zip(costs(line.runs), COSTS, strict=True) if name in SHORT]
        text += row([line.label, *cells, *paid, needs_in_words(line.runs[0]["needs"])])
    plm = shipped.experiment["plm"]
    return text + (
        f"\n{plm['name']} ({plm['parameters'] / 1e6:.1f} M parameters), means over {len(shipped.experiment['seeds'])} "
        f"seeds. **+** and **-**: better and worse than {shipped.experiment['reference']}, p < 0.05 (paired "
        f"bootstrap). Memory and time are those of training on {SUPPORT}; spreads, chrF and the costs elsewhere are in "
        "[docs/results.md](docs/results.md). " + source(shipped.comparison, summary_command()) + "\n"
    )


def embedded() -> list[Results]:
    """The comparisons that have the embedded PLM."""
    return [
        results for results in map(read_results, files(FOLDER)) if results.experiment["plm"]["name"] == EMBEDDED_FOLDER
    ]


def summary_command() -> str:
    """What makes the results of the summary."""
    return command("{" + ",".join(results.experiment["name"] for results in embedded()) + "}")


def cell(results: Results, label: str, name: str) -> str:
    """The mean of a metric, with its mark; "-" where the label was not run."""
    for each, line in zip(results.comparison["rows"], results.lines, strict=True):
        if line.label == label:
            return score(name, each["metrics"][name] | {"std": None}, line.marks.get(name))
    return "-"


def score(name: str, interval: Mapping[str, Any], mark: str | None) -> str:
    """Mean, spread, and whether it differs from the reference."""
    text = score_text(name, interval["mean"])
    if interval["std"] is not None:
        text += f" ± {score_text(name, interval['std'])}"
    return text if mark is None else f"{text} **{mark}**"


def costs(runs: Sequence[Mapping[str, Any]]) -> list[str]:
    """Means over the runs; what no training has is left out."""
    trained = any(run["costs"]["train_seconds"] for run in runs)
    cells = []
    for name, unit, digits in COSTS.values():
        of_training = name != "seconds_per_token"
        mean = fmean(run["costs"][name] for run in runs) * unit
        cells.append("-" if of_training and not trained else f"{mean:.{digits}f}")
    return cells
