"""The comparison table: quality, costs and needs of every method, readable without scripts, sortable with them."""

from __future__ import annotations

from html import escape

from pema.evaluation.notation import bounds_text, is_better, metric_name, score_text
from pema.experiments.formats import COSTS, NOT_HELPED, no_help_text, p_value, texts_text
from pema.experiments.records import Interval, Results

NEEDS = (("weights", "PLM weights"), ("targets_at_owner", "Targets at the owner"), ("gradients", "Gradients"))
WORDS = {"none": "no", False: "no", True: "yes", "some": "some", "all": "all"}
"""Texts of needs, from the smallest to the largest."""
SERIES = 10
"""Number of colours in `page.css`; the eleventh method has the first colour again, with another shape in the plots."""
WIDTH = 120
"""Width of the drawing of an interval, in its own units."""


def comparison_table(experiment: Results, key: str) -> str:
    """Return the table as HTML; `key` is the prefix of the experiment's anchors."""
    metrics, costs = experiment.metrics, experiment.cost_columns(COSTS)
    groups = (("", 1), ("Quality", len(metrics)), ("Cost", len(costs)), ("Needs", len(NEEDS)))
    heads = [("Method", "ascending", "")]
    heads += [(metric_name(metric), "descending", ' class="quality"') for metric in metrics]
    heads += [(COSTS[name].title, "ascending", "") for name in costs] + [(title, "ascending", "") for _, title in NEEDS]
    group_row = "".join(
        f'<th scope="colgroup" colspan="{span}">{name}</th>' if name else "<td></td>" for name, span in groups
    )
    head_row = "".join(
        f'<th scope="col" data-first="{first}"{kind}><span>{escape(title)}</span></th>' for title, first, kind in heads
    )
    body = "\n".join(_row(experiment, label, row, key) for row, label in enumerate(experiment.about.methods))
    return f"""<div class="scroll" role="region" aria-labelledby="{key}-caption" tabindex="0">
<table class="comparison">
<caption class="unseen" id="{key}-caption">{escape(experiment.about.title)}: methods compared</caption>
<colgroup><col></colgroup>{"".join(f"<colgroup span={span}></colgroup>" for _, span in groups[1:])}
<thead>
<tr class="groups">{group_row}</tr>
<tr>{head_row}</tr>
</thead>
<tbody>
{body}
</tbody>
</table>
</div>"""


def _row(experiment: Results, label: str, row: int, key: str) -> str:
    seeds = experiment.rows[label].seeds
    reference = ", reference" if label == experiment.about.reference else ""
    unhelped = escape(no_help_text([experiment.rows[label]]))
    flag = f'<span class="flag" title="{unhelped}"> {NOT_HELPED}</span>' if unhelped else ""
    cells = [
        f'<th scope="row" data-value="{row}"><span class="swatch series-{row % SERIES}"></span>'
        f'<a href="#{key}-m{row}">{escape(label)}</a>{flag}'
        f'<span class="seeds">{seeds} seed{"" if seeds == 1 else "s"}{reference}</span></th>'
    ]
    cells += [_quality(experiment, label, metric, row, key) for metric in experiment.metrics]
    for name in experiment.cost_columns(COSTS):
        value, std = experiment.cost(label, name), experiment.cost_spread(label, name)
        spread = f' title="± {COSTS[name].text(std)} over seeds"' if std else ""
        cells.append(f'<td data-value="{_sortable(value)}"{spread}>{COSTS[name].text(value)}</td>')
    for name, _ in NEEDS:
        need = getattr(experiment.runs[label][0].needs, name)
        needed = "" if WORDS[need] == "no" else ' class="needed"'
        cells.append(f'<td data-value="{[*WORDS].index(need)}"{needed}>{WORDS[need]}</td>')
    return f'<tr data-method="{row}">{"".join(cells)}</tr>'


def _quality(experiment: Results, label: str, metric: str, row: int, key: str) -> str:
    interval = experiment.rows[label].metrics[metric]
    best = " best" if interval.mean == experiment.best(metric) else ""
    spread = "" if interval.std is None else f' <span class="std">± {score_text(metric, interval.std)}</span>'
    bounds = bounds_text(metric, interval.low, interval.high)
    reference = experiment.about.reference
    return (
        f'<td class="quality{best}" data-value="{_sortable(interval.mean)}">'
        f'<a href="#{key}-m{row}">{score_text(metric, interval.mean)}</a>{spread}'
        f"{_drawn_interval(experiment, label, metric, row)}"
        f'<span class="interval">{bounds}</span>{_texts(experiment, interval)}'
        f"{_difference(experiment, reference, label, metric)}</td>"
    )


def _texts(experiment: Results, interval: Interval) -> str:
    text = texts_text(interval, experiment.about.data.test)
    return f'<span class="texts">{text} texts</span>' if text else ""


def difference_tables(experiment: Results) -> str:
    """Return a table per further reference, with the difference of every method from it."""
    return "".join(
        _difference_table(experiment, reference)
        for reference in experiment.differences
        if reference != experiment.about.reference
    )


def _difference_table(experiment: Results, reference: str) -> str:
    heads = "".join(f'<th scope="col">{escape(metric_name(metric))}</th>' for metric in experiment.metrics)
    rows = "\n".join(
        f'<tr><th scope="row"><span class="swatch series-{row % SERIES}"></span>{escape(label)}</th>'
        + "".join(f"<td>{_difference(experiment, reference, label, m, bounds=True)}</td>" for m in experiment.metrics)
        + "</tr>"
        for row, label in enumerate(experiment.about.methods)
        if label != reference
    )
    return f"""<details class="differences"><summary>Compared with {escape(reference)}</summary>
<div class="scroll" role="region" aria-label="Compared with {escape(reference)}" tabindex="0"><table>
<thead><tr><th scope="col">Method</th>{heads}</tr></thead>
<tbody>
{rows}
</tbody>
</table></div>
</details>
"""


def _difference(experiment: Results, reference: str | None, label: str, metric: str, *, bounds: bool = False) -> str:
    """Return the difference of a method from `reference`, with its interval in the cell or as a title."""
    gap = experiment.difference(reference, label, metric)
    if gap is None:
        return ""
    sign, kind, verdict = "≈", "same", "not significantly different from"
    if gap.significant:
        sign, verdict = ("▲", "significantly above") if gap.difference > 0 else ("▼", "significantly below")
        kind = "better" if is_better(metric, gap.difference) else "worse"
    difference = score_text(metric, gap.difference, signed=True)
    interval = bounds_text(metric, gap.low, gap.high, signed=True)
    title = "" if bounds else f' title="95 % interval of the difference: {interval}"'
    suffix = f'<span class="interval">{interval}</span>' if bounds else ""
    return (
        f'<span class="difference {kind}"{title}>'
        f'<span aria-hidden="true">{sign}</span><span class="unseen">{verdict} {escape(str(reference))}: </span> '
        f"{difference}, {escape(p_value(gap.p_value))}</span>{suffix}"
    )


def _drawn_interval(experiment: Results, label: str, metric: str, row: int) -> str:
    """Draw an interval and its mean on the scale of the column."""
    intervals = [each.metrics[metric] for each in experiment.rows.values()]
    low, high = min(each.low for each in intervals), max(each.high for each in intervals)
    interval = experiment.rows[label].metrics[metric]
    left, middle, right = (
        4 + (WIDTH - 8) * (end - low) / ((high - low) or 1.0) for end in (interval.low, interval.mean, interval.high)
    )
    return (
        f'<svg class="whisker series-{row % SERIES}" viewBox="0 0 {WIDTH} 10" aria-hidden="true">'
        f'<path class="rail" d="M0 5H{WIDTH}"/><path class="span" d="M{left:.1f} 5H{right:.1f}"/>'
        f'<circle cx="{middle:.1f}" cy="5" r="3.5"/></svg>'
    )


def _sortable(value: float | None) -> str:
    return "" if value is None else repr(value)
