"""The tables of committed comparisons, for README and docs."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence

from pema.evaluation.notation import NOTHING, metric_name, score_text
from pema.experiments.formats import COSTS, difference_text, mean_text, needs_text
from pema.experiments.records import Results
from reproduction.lines import SUFFIX, files
from reproduction.paths import RESULTS
from reproduction.tables.markdown import head, row, source
from reproduction.tables.results import DEV, Line, lines_of, read_results, title_of

FOLDER = RESULTS / "compare"
SPENT = {
    "train_peak_bytes": "peak memory",
    "train_seconds": "training",
    "seconds_per_token": "a token",
    "disk_bytes": "disk",
}
SUMMARISED = ("bleu", "sari", "accuracy", "label_accuracy", "slot_errors", "formality_accuracy")


def command(name: str) -> str:
    """Return the command that produces the results of a comparison."""
    return f"pema compare reproduction/configs/compare/{name}.toml"


def comparisons() -> str:
    """Return the tables of all comparisons."""
    return "".join(comparison(file.stem) for file in files(FOLDER))


def comparison(name: str) -> str:
    """Return one table of quality with significance, costs and needs of each method."""
    results = read_results(FOLDER / f"{name}{SUFFIX}")
    about = results.about
    parts = ", ".join(f"{getattr(about.data, part):,} {part}" for part in ("train", "dev", "test"))
    text = f"### {about.title}\n\n"
    text += head(["", *map(metric_name, results.metrics), title_of(DEV), *SPENT.values(), "needs"])
    for line in lines_of(results):
        scores = [score(line, name) for name in results.metrics]
        text += row([line.label, *scores, line.text(DEV), *costs(line, SPENT), needs_text(line.runs[0].needs)])
    seeds = len(about.seeds)
    spread = f"mean ± standard deviation over {seeds} seeds" if seeds > 1 else "one seed"
    text += (
        f"\n{about.plm['name']} ({about.plm['parameters'] / 1e6:.1f} M parameters), examples: {parts}; {spread}. "
        f"**+** and **-**: better and worse than {about.reference}, p < 0.05 (paired bootstrap). Dev perplexity: of a "
        "token of the dev targets. "
    )
    not_run = [label for label in about.runs or () if label not in results.runs]
    if not_run:
        text += f"Not run yet: {', '.join(not_run)}. "
    text += source(results.comparison.signature, command(name)) + "\n"
    further = [reference for reference in results.differences if reference != about.reference]
    return text + "".join(against(results, reference) for reference in further)


def against(results: Results, reference: str) -> str:
    """Return a table of the difference of every line from `reference`."""
    text = head([f"difference from {reference} (95 % interval), p", *map(metric_name, results.metrics)])
    differences = results.differences[reference]
    for label in dict.fromkeys(label for label, _ in differences):
        text += row([label, *(difference_text(name, differences[label, name]) for name in results.metrics)])
    return text + "\n"


def by_plm() -> dict[str, list[Results]]:
    """Return the comparisons of each PLM that has several."""
    plms: dict[str, list[Results]] = defaultdict(list)
    for file in files(FOLDER):
        results = read_results(file)
        plms[results.about.plm["name"]].append(results)
    return {name: every for name, every in plms.items() if len(every) > 1}


def summaries() -> str:
    """Return a table for each PLM with several comparisons: every method on all data sets."""
    return "".join(summary(name, every) for name, every in by_plm().items())


def summary(plm: str, every: Sequence[Results]) -> str:
    """Return the table of one PLM."""
    columns = [(results, name) for results in every for name in results.metrics if name in SUMMARISED]
    titles = [f"{metric_name(name)}, {results.about.data.name}" for results, name in columns]
    text = f"### {plm}: methods side by side\n\n" + head(["", *titles, "needs"])
    lines = {line.label: line for results in every for line in lines_of(results)}
    for label, line in lines.items():
        cells = [cell(results, label, name) for results, name in columns]
        text += row([label, *cells, needs_text(line.runs[0].needs)])
    return text + (
        f"\nMeans over seeds. **+** and **-**: better and worse than {every[0].about.reference}, p < 0.05 (paired "
        "bootstrap). Sizes of data, seeds, spreads, further metrics and costs are in the tables below. "
        + source(every[0].comparison.signature, summary_command(every))
        + "\n"
    )


def summary_command(every: Sequence[Results]) -> str:
    """Return the command that produces the results of a summary."""
    return command("{" + ",".join(results.about.name for results in every) + "}")


def cell(results: Results, label: str, name: str) -> str:
    """Return the mean of a metric with its mark; a dash if the label was not run."""
    if label not in results.rows:
        return NOTHING
    return marked(score_text(name, results.rows[label].metrics[name].mean), Line(results, label).mark(name))


def score(line: Line, name: str) -> str:
    """Return mean and spread, and whether it differs from the reference."""
    return marked(mean_text(name, line.results.rows[line.label].metrics[name]), line.mark(name))


def marked(text: str, mark: str) -> str:
    """Return a text followed by its mark, if it has one."""
    return f"{text} **{mark}**" if mark else text


def costs(line: Line, names: Iterable[str]) -> list[str]:
    """Return means over the runs, without costs that no training has."""
    trained = any(run.costs.train_seconds for run in line.runs)
    return [
        COSTS[name].text(line.results.cost(line.label, name)) if trained or name == "seconds_per_token" else NOTHING
        for name in names
    ]
