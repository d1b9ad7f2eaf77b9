"""The studies: run them, and write their pages in `docs/studies/`.

    python -m reproduction.studies FOLDER

FOLDER holds what `python -m reproduction.data.real` wrote and, for the study of PLM size, folders of PLMs. What is
finished in the folder of `--work` is skipped, so a study that was stopped goes on where it was; a finished one goes to
`reproduction/results/studies/NAME.jsonl`.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pema.errors import PemaError
from pema.experiments.config import read_config
from pema.experiments.experiment import Kind
from pema.experiments.records import Results
from reproduction import paths
from reproduction.folders import run_into
from reproduction.lines import SUFFIX
from reproduction.plots import dot_plot, line_plot
from reproduction.tables.markdown import BEGIN, END, head, replace_block, row, source, write
from reproduction.tables.results import DEV, PARAMETERS, PLM, SECONDS, lines_of, read_results, text_of, title_of

CONFIGS, RESULTS, PAGES = paths.CONFIGS / "studies", paths.RESULTS / "studies", paths.DOCS / "studies"


@dataclass(frozen=True)
class Study:
    """What a study asks and how its plot shows it.

    Attributes:
        question: in one sentence.
        x: the swept setting on the plot's horizontal axis; None: one row a method.
        facet: a setting with a column of panels for each of its values.
        kind: what the config is for.
        shipped: whether its data lie in the repository, at paths from the config.
    """

    question: str
    x: str | None = None
    facet: str | None = None
    kind: Kind = "sweep"
    shipped: bool = False


STUDIES = {
    "rank": Study(
        "Is quality flat in the rank r, as LoRA's paper finds for itself, or does the last layer want more?", "rank"
    ),
    "schedules": Study(
        "Which course of the mixture weight, and which lambda_max, for which contexts?", "lambda_max", "contexts"
    ),
    "memory-size": Study("Where does quality level off as the memory grows?", "examples"),
    "ablations": Study("What do the residual, the activation, the width and the seen vocabulary each do?"),
    "kappa": Study("How much reconstruction should the joint loss have?", "kappa"),
    "targets": Study("With contexts that the PLM predicted: targets by position, or aligned?"),
    "equal-time": Study("What do full fine-tuning and LoRA reach in the time that PEMA trains?", kind="compare"),
    "plm-size": Study("Does PEMA help a larger PLM as much as a smaller one?", "plm"),
    "classification": Study("A task with one word to say: which department?", kind="compare", shipped=True),
    "qa": Study("A task with a few words to find: what does the text answer?", kind="compare", shipped=True),
    "summarisation": Study("A task with a sentence to write: what is the ticket about?", kind="compare", shipped=True),
}
"""By name, in the order in which they are run."""


def run(folder: Path, work: Path, names: Sequence[str]) -> list[str]:
    """Run these studies.

    Args:
        folder: data and PLMs.
        work: memories, trained models and single runs; what is finished there is skipped.
        names: of studies.

    Returns:
        Why the ones that failed did; the others are run nevertheless.
    """
    failed, work = [], work.resolve()
    # A PLM's folder is named from the working directory.
    with contextlib.chdir(folder):
        for name in names:
            print(f"{name} ...", flush=True)
            study = STUDIES[name]
            root = None if study.shipped else Path()
            try:
                experiment = read_config(CONFIGS / f"{name}.toml", study.kind, root)
                run_into(results_of(name), experiment, work)
            except PemaError as error:
                failed.append(f"{name}: {error}")
    return failed


def results_of(name: str) -> Path:
    """The file with the results of a study."""
    return RESULTS / f"{name}{SUFFIX}"


def command(name: str) -> str:
    """What makes the results of a study."""
    return f"pema {STUDIES[name].kind} reproduction/configs/studies/{name}.toml"


def finished() -> list[str]:
    """The studies that have results."""
    return [name for name in STUDIES if results_of(name).exists()]


def plot(name: str) -> bytes:
    """The SVG file of a study."""
    study, results = STUDIES[name], read_results(results_of(name))
    return dot_plot(results) if study.x is None else line_plot(results, study.x, study.facet)


def block(name: str) -> str:
    """What stands between the markers of a study's page."""
    results = read_results(results_of(name))
    return (
        f"![{results.about.title}]({name}.svg)\n\n"
        + table(results)
        + "\n"
        + source(results.comparison.signature, command(name))
    )


def table(results: Results) -> str:
    """All lines, and what they are means of."""
    about, lines = results.about, lines_of(results)
    measured = [line for line in lines if line.mean(DEV) is not None]
    # Perplexities of different PLMs are of different tokens.
    comparable = measured if PLM not in (about.axes or {}) else []
    chosen = min(comparable, key=lambda line: line.mean(DEV) or 0.0, default=None)
    text = head(["", *map(title_of, (*results.metrics, DEV, PARAMETERS, SECONDS))])
    for line in lines:
        cells = [f"{line.text(name)} {line.mark(name)}".rstrip() for name in results.metrics]
        cells += [f"**{line.text(DEV)}**" if line is chosen else line.text(DEV)]
        text += row([line.title, *cells, text_of(PARAMETERS, line.mean(PARAMETERS)), line.text(SECONDS)])
    data, seeds = about.data, ", ".join(map(str, about.seeds))
    text += f"\n{data.name}: {data.train:,} examples to learn from, {data.dev} dev, {data.test} test. "
    text += f"Mean ± standard deviation over seeds {seeds}" if len(about.seeds) > 1 else f"Seed {seeds}"
    if about.reference is not None:
        text += f"; + better, - worse than {about.reference} (paired bootstrap over test sentences, p < 0.05)"
    return text + (". **Bold**: what dev data choose.\n" if chosen else ".\n")


def index() -> str:
    """One line a study that has results."""
    titles = {name: read_results(results_of(name)).about.title for name in finished()}
    return "".join(f"- [{title}]({name}.md): {STUDIES[name].question}\n" for name, title in titles.items())


def write_pages() -> None:
    """Write the plot and the block of every study with results, and the index; a new page is begun."""
    for name in finished():
        page = PAGES / f"{name}.md"
        if not page.exists():
            title = read_results(results_of(name)).about.title
            write(page, f"# {title}\n\n{STUDIES[name].question}\n\n{BEGIN}{END}".encode())
        write(PAGES / f"{name}.svg", plot(name))
        replace_block(page, block(name))
    replace_block(PAGES / "README.md", index())


def main() -> None:
    """Run the studies."""
    parser = argparse.ArgumentParser(
        prog="python -m reproduction.studies",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="data and PLMs")
    parser.add_argument("--only", nargs="+", choices=STUDIES, default=list(STUDIES), metavar="NAME", help="run these")
    parser.add_argument("--work", type=Path, default=Path("runs"), help="memories, trained models and single runs")
    given = parser.parse_args()
    failed = run(given.folder, given.work, given.only)
    write_pages()
    if failed:
        sys.exit("\n".join(failed))


if __name__ == "__main__":
    main()
