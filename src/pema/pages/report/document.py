"""The page of the report: tables, plots, samples and signatures of every experiment."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path

from pema.evaluation.notation import metric_name, score_text
from pema.experiments.formats import missing_text, no_help_text
from pema.experiments.reader import read_results
from pema.experiments.records import Results
from pema.pages.page import html_page, static
from pema.pages.report.runs import all_runs
from pema.pages.report.summary import payload
from pema.pages.report.table import comparison_table, difference_tables

STYLES = ("report/report.css", "report/plots.css")
SCRIPTS = tuple(
    f"report/{name}.js" for name in ("table", "scale", "chart", "labels", "plots", "controls", "difference", "samples")
)


def report(results: Path) -> str:
    """Build the page of one experiment's folder, or of a folder of several.

    Raises:
        DataError: see `read_results`.
    """
    return page(read_results(results))


def page(experiments: Sequence[Results]) -> str:
    """Build the page of experiments; equal results give identical bytes."""
    keys = [f"e{number}" for number in range(len(experiments))]
    alone = len(experiments) == 1
    body = "\n".join(_section(experiment, key, alone) for experiment, key in zip(experiments, keys, strict=True))
    if alone:
        title, description = experiments[0].about.title, ""
    else:
        title = f"{len(experiments)} experiments"
        description = "Comparisons and sweeps of adaptation methods, each with its samples and signatures."
        body = _contents(experiments, keys) + body
    return html_page(
        title,
        body,
        css=[static(name) for name in STYLES],
        js=[static(name) for name in SCRIPTS],
        data={key: payload(experiment) for key, experiment in zip(keys, experiments, strict=True)},
        description=description,
    )


def _contents(experiments: Sequence[Results], keys: list[str]) -> str:
    items = []
    for experiment, key in zip(experiments, keys, strict=True):
        metric = experiment.metrics[0]
        best = experiment.best(metric)
        row = next(row for row in experiment.comparison.rows if row.metrics[metric].mean == best)
        text = f"best {metric_name(metric)}: {score_text(metric, best)}, {row.label}"
        items.append(
            f'<li><a href="#{key}">{escape(experiment.about.title)}</a><span class="muted">{escape(text)}</span></li>'
        )
    return f'<nav aria-label="Experiments"><ol class="contents">{"".join(items)}</ol></nav>\n'


def _section(experiment: Results, key: str, alone: bool) -> str:
    # The title of a single experiment is the page's heading, and the headings of its parts move up one level.
    title = "" if alone else f'<h2 id="{key}-title">{escape(experiment.about.title)}</h2>'
    part = "h2" if alone else "h3"
    about = experiment.about
    data, plm = about.data, about.plm
    facts = (
        ("Task", about.task),
        ("Data", f"{data.name}: {data.train:,} train, {data.dev:,} dev, {data.test:,} test"),
        ("PLM", f"{plm['name']}: {plm['parameters']:,} parameters, d {plm['d']:,}, {plm['vocabulary_size']:,} tokens"),
        ("Seeds", ", ".join(map(str, about.seeds))),
    )
    listed = "".join(f"<div><dt>{name}</dt><dd>{escape(value)}</dd></div>" for name, value in facts)
    compared = ""
    if about.reference is not None:
        compared = (
            f'Compared with <b>{escape(about.reference)}</b>: <span class="better">▲&nbsp;significantly above</span>, '
            '<span class="worse">▼&nbsp;significantly below</span>, '
            '<span class="same">≈&nbsp;no significant difference</span>. '
        )
    drawn = {"chooser": "", "sweep": "Sweep", "cost": "Quality against cost", "curves": "Learning curves"}
    if not about.axes:  # a comparison, or a sweep whose methods have no grid
        del drawn["sweep"]
    if not any(run.curve for runs in experiment.runs.values() for run in runs):
        del drawn["curves"]
    plots = "\n".join(
        f'<section id="{key}-{name}">{heading and f"<{part}>{heading}</{part}>"}</section>'
        for name, heading in drawn.items()
    )
    return f"""<article class="experiment" id="{key}">
{title}
<dl class="facts">{listed}</dl>
<section><{part}>Comparison</{part}>
{comparison_table(experiment, key)}
<p class="legend">Mean ± standard deviation over seeds, and the 95 % bootstrap interval of the mean. {compared}The
best mean is bold. Costs are means over seeds; 1 MB is a million bytes. A method's name or score opens its
runs and their signatures.</p>
{_notes(experiment)}{difference_tables(experiment)}</section>
<noscript><p class="note">Plots and samples need scripts; this table and the signatures do not.</p></noscript>
{plots}
<section id="{key}-samples"><{part}>Samples</{part}></section>
<section class="runs"><{part}>Every run and its signature</{part}>
{all_runs(experiment, key)}
</section>
</article>"""


def _notes(experiment: Results) -> str:
    """Return the notes below the table: runs whose training did not help, and missing runs."""
    notes = (no_help_text(experiment.rows.values()), missing_text(experiment))
    return "".join(f'<p class="note">{escape(note)}</p>\n' for note in notes if note)
