"""The studies: their runs, and their pages in `docs/studies/`.

    python -m reproduction.studies

Their data are bundled. Finished runs in the folder of `--work` are skipped, so that an interrupted study continues; a
finished study goes to `reproduction/results/studies/NAME.jsonl`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pema.errors import PemaError
from pema.experiments.config import read_config
from pema.experiments.records import Results
from reproduction import paths
from reproduction.folders import run_into
from reproduction.lines import SUFFIX
from reproduction.plots import dot_plot, line_plot
from reproduction.tables.markdown import BEGIN, END, head, replace_block, row, source, write
from reproduction.tables.results import DEV, PARAMETERS, lines_of, read_results, text_of, title_of

CONFIGS, RESULTS, PAGES = paths.CONFIGS / "studies", paths.RESULTS / "studies", paths.DOCS / "studies"


@dataclass(frozen=True)
class Study:
    """Question and plot of a study.

    Attributes:
        question: the question in one sentence.
        x: the swept setting on the plot's horizontal axis; None: one row per method.
    """

    question: str
    x: str | None = None


STUDIES = {
    "rank": Study(
        "Is quality flat in the rank r, as LoRA's paper finds for itself, or does the last layer need more?", "rank"
    ),
    "memory-size": Study("How many examples does an adapter need, and what does it do with few?", "examples"),
    "contexts": Study("What is lost if the PLM sees no target, and does the alignment of targets help?"),
    "ablations": Study("What is the effect of each part of preset `best`, and what is left when they are taken away?"),
    "kappa": Study("How much weight should reconstruction have in the joint loss?", "kappa"),
}
"""Studies by name, in the order in which they are run."""


def run(work: Path, names: Sequence[str]) -> list[str]:
    """Run studies.

    Args:
        work: folder of memories, trained models and runs; finished ones are skipped.
        names: names of studies.

    Returns:
        Why the ones that failed did; the others are run nevertheless.
    """
    failed = []
    for name in names:
        print(f"{name} ...", flush=True)
        try:
            run_into(results_of(name), read_config(CONFIGS / f"{name}.toml", "sweep"), work)
        except PemaError as error:
            failed.append(f"{name}: {error}")
    return failed


def results_of(name: str) -> Path:
    """Return the file with the results of a study."""
    return RESULTS / f"{name}{SUFFIX}"


def command(name: str) -> str:
    """Return the command that produces the results of a study."""
    return f"pema sweep reproduction/configs/studies/{name}.toml"


def finished() -> list[str]:
    """Return the studies that have results."""
    return [name for name in STUDIES if results_of(name).exists()]


def plot(name: str) -> bytes:
    """Return the SVG file of a study."""
    study, results = STUDIES[name], read_results(results_of(name))
    return dot_plot(results) if study.x is None else line_plot(results, study.x)


def block(name: str) -> str:
    """Return the generated part of a study's page."""
    results = read_results(results_of(name))
    return (
        f"![{results.about.title}]({name}.svg)\n\n"
        + table(results)
        + "\n"
        + source(results.comparison.signature, command(name))
    )


def table(results: Results) -> str:
    """Return the table of all lines, with a note about the means."""
    about, lines = results.about, lines_of(results)
    measured = [line for line in lines if line.mean(DEV) is not None]
    chosen = min(measured, key=lambda line: line.mean(DEV) or 0.0, default=None)
    text = head(["", *map(title_of, (*results.metrics, DEV, PARAMETERS))])
    for line in lines:
        cells = [f"{line.text(name)} {line.mark(name)}".rstrip() for name in results.metrics]
        cells += [f"**{line.text(DEV)}**" if line is chosen else line.text(DEV)]
        text += row([line.title, *cells, text_of(PARAMETERS, line.mean(PARAMETERS))])
    data, used = about.data, sorted({run.seed for runs in results.runs.values() for run in runs})
    seeds = ", ".join(map(str, used))
    text += f"\n{about.plm['name']} ({about.plm['parameters'] / 1e6:.1f} M parameters), {data.name}: {data.train:,} "
    text += f"training examples, {data.dev} dev, {data.test} test. "
    text += f"Mean ± standard deviation over seeds {seeds}" if len(used) > 1 else f"Seed {seeds}"
    if len({len(line.runs) for line in lines if not line.is_plm}) > 1:
        text += "; without ± one run"
    if about.reference is not None:
        text += f"; + better, - worse than {about.reference} (paired bootstrap over test sentences, p < 0.05)"
    return text + (". **Bold**: what dev data choose.\n" if chosen else ".\n")


def index() -> str:
    """Return one line per study with results."""
    titles = {name: read_results(results_of(name)).about.title for name in finished()}
    return "".join(f"- [{title}]({name}.md): {STUDIES[name].question}\n" for name, title in titles.items())


def write_pages() -> None:
    """Write the plot and the generated part of every study with results, and the index; create missing pages."""
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
    parser.add_argument("--only", nargs="+", choices=STUDIES, default=list(STUDIES), metavar="NAME", help="run these")
    parser.add_argument("--work", type=Path, default=Path("runs"), help="memories, trained models and single runs")
    given = parser.parse_args()
    failed = run(given.work, given.only)
    write_pages()
    if failed:
        sys.exit("\n".join(failed))


if __name__ == "__main__":
    main()
