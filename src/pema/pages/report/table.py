"""The comparison table: quality, costs and needs of every method, readable without scripts, sortable with them."""

from __future__ import annotations

import math
from collections.abc import Callable
from html import escape

from pema.experiments import formats
from pema.experiments.fields import ACCELERATOR
from pema.experiments.records import Experiment
from pema.pages.report.summary import cost, top

COSTS = (
    ("trainable_parameters", "Trainable parameters", formats.scaled),
    ("train_peak_bytes", "Peak training memory", lambda value: formats.scaled(value, "B")),
    (ACCELERATOR, "Peak accelerator memory", lambda value: formats.scaled(value, "B")),
    ("train_seconds", "Training time", formats.seconds),
    ("seconds_per_token", "Time per token", formats.seconds),
    ("disk_bytes", "Disk", lambda value: formats.scaled(value, "B")),
)
NEEDS = (("weights", "PLM weights"), ("targets_at_owner", "Targets at the owner"), ("gradients", "Gradients"))
WORDS = {"none": "no", False: "no", True: "yes", "some": "some", "all": "all"}
"""What is needed, in words, from the least to the most."""
SERIES = 10
"""Colours of `page.css`; the eleventh method has the first one's, and another shape in the plots."""
WIDTH = 120
"""Width of the drawing of an interval, in units of its own."""


def comparison_table(experiment: Experiment, key: str) -> str:
    """Write the table; `key` is the prefix of the experiment's anchors."""
    metrics, costs = experiment.metrics, _costs(experiment)
    groups = (("", 1), ("Quality", len(metrics)), ("Cost", len(costs)), ("Needs", len(NEEDS)))
    heads = [("Method", "ascending", "")]
    heads += [(formats.metric_name(metric), "descending", ' class="quality"') for metric in metrics]
    heads += [(title, "ascending", "") for _, title, _ in costs] + [(title, "ascending", "") for _, title in NEEDS]
    group_row = "".join(
        f'<th scope="colgroup" colspan="{span}">{name}</th>' if name else "<td></td>" for name, span in groups
    )
    head_row = "".join(
        f'<th scope="col" data-first="{first}"{kind}><span>{escape(title)}</span></th>' for title, first, kind in heads
    )
    body = "\n".join(_row(experiment, label, place, key) for place, label in enumerate(experiment.about["methods"]))
    return f"""<div class="scroll" role="region" aria-labelledby="{key}-caption" tabindex="0">
<table class="comparison">
<caption class="unseen" id="{key}-caption">{escape(experiment.about["title"])}: methods compared</caption>
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


def _costs(experiment: Experiment) -> list[tuple[str, str, Callable[[float | None], str]]]:
    """The costs that the table has columns for: memory of an accelerator where there was one."""
    accelerated = any(cost(experiment, label, ACCELERATOR) for label in experiment.runs)
    return [column for column in COSTS if accelerated or column[0] != ACCELERATOR]


def _row(experiment: Experiment, label: str, place: int, key: str) -> str:
    seeds = experiment.rows[label]["seeds"]
    reference = ", reference" if label == experiment.about["reference"] else ""
    cells = [
        f'<th scope="row" data-value="{place}"><span class="swatch series-{place % SERIES}"></span>'
        f'<a href="#{key}-m{place}">{escape(label)}</a>'
        f'<span class="seeds">{seeds} seed{"" if seeds == 1 else "s"}{reference}</span></th>'
    ]
    cells += [_quality(experiment, label, metric, place, key) for metric in experiment.metrics]
    for name, _, write in _costs(experiment):
        found = cost(experiment, label, name)
        spread = f' title="± {write(found["std"])} over seeds"' if found and found["std"] else ""
        value = found["mean"] if found else None
        cells.append(f'<td data-value="{_sortable(value)}"{spread}>{write(value)}</td>')
    needs = experiment.runs[label][0]["needs"]
    for name, _ in NEEDS:
        needed = "" if WORDS[needs[name]] == "no" else ' class="needed"'
        cells.append(f'<td data-value="{[*WORDS].index(needs[name])}"{needed}>{WORDS[needs[name]]}</td>')
    return f'<tr data-method="{place}">{"".join(cells)}</tr>'


def _quality(experiment: Experiment, label: str, metric: str, place: int, key: str) -> str:
    found, largest = experiment.rows[label]["metrics"][metric], top(experiment, metric)
    best = " best" if found["mean"] == largest else ""
    spread = "" if found["std"] is None else f' <span class="std">± {formats.score(found["std"], largest)}</span>'
    low, high = formats.score(found["low"], largest), formats.score(found["high"], largest)
    reference = experiment.about["reference"]
    return (
        f'<td class="quality{best}" data-value="{_sortable(found["mean"])}">'
        f'<a href="#{key}-m{place}">{formats.score(found["mean"], largest)}</a>{spread}'
        f"{_drawn_interval(experiment, label, metric, place)}"
        f'<span class="interval">{low} to {high}</span>{_difference(experiment, reference, label, metric)}</td>'
    )


def difference_tables(experiment: Experiment) -> str:
    """Write a table for each further reference: by how much every method differs from it."""
    return "".join(
        _difference_table(experiment, reference)
        for reference in experiment.differences
        if reference != experiment.about["reference"]
    )


def _difference_table(experiment: Experiment, reference: str) -> str:
    heads = "".join(f'<th scope="col">{escape(formats.metric_name(metric))}</th>' for metric in experiment.metrics)
    rows = "\n".join(
        f'<tr><th scope="row"><span class="swatch series-{place % SERIES}"></span>{escape(label)}</th>'
        + "".join(f"<td>{_difference(experiment, reference, label, m, bounds=True)}</td>" for m in experiment.metrics)
        + "</tr>"
        for place, label in enumerate(experiment.about["methods"])
        if label != reference
    )
    return f"""<details class="differences"><summary>Against {escape(reference)}</summary>
<div class="scroll" role="region" aria-label="Against {escape(reference)}" tabindex="0"><table>
<thead><tr><th scope="col">Method</th>{heads}</tr></thead>
<tbody>
{rows}
</tbody>
</table></div>
</details>
"""


def _difference(experiment: Experiment, reference: str | None, label: str, metric: str, *, bounds: bool = False) -> str:
    """How much a method differs from `reference`; its interval too, or as a title."""
    found = None if reference is None else experiment.differences.get(reference, {}).get((label, metric))
    if found is None:
        return ""
    largest = top(experiment, metric)
    sign, kind, said = "≈", "same", "not significantly different from"
    if found["significant"]:
        better = found["difference"] > 0
        sign, kind, said = ("▲", "better", "significantly above") if better else ("▼", "worse", "significantly below")
    difference = formats.score(found["difference"], largest, signed=True)
    interval = " to ".join(formats.score(found[end], largest, signed=True) for end in ("low", "high"))
    title = "" if bounds else f' title="95 % interval of the difference: {interval}"'
    behind = f'<span class="interval">{interval}</span>' if bounds else ""
    return (
        f'<span class="difference {kind}"{title}>'
        f'<span aria-hidden="true">{sign}</span><span class="unseen">{said} {escape(str(reference))}: </span> '
        f"{difference}, {formats.p_value(found['p_value'])}</span>{behind}"
    )


def _drawn_interval(experiment: Experiment, label: str, metric: str, place: int) -> str:
    """Draw the interval and its mean on the column's scale."""
    all_found = [row["metrics"][metric] for row in experiment.rows.values()]
    low, high = min(f["low"] for f in all_found), max(f["high"] for f in all_found)
    found = experiment.rows[label]["metrics"][metric]
    if not all(map(math.isfinite, (low, high, found["mean"]))):
        return ""
    left, middle, right = (
        4 + (WIDTH - 8) * (found[end] - low) / ((high - low) or 1.0) for end in ("low", "mean", "high")
    )
    return (
        f'<svg class="whisker series-{place % SERIES}" viewBox="0 0 {WIDTH} 10" aria-hidden="true">'
        f'<path class="rail" d="M0 5H{WIDTH}"/><path class="span" d="M{left:.1f} 5H{right:.1f}"/>'
        f'<circle cx="{middle:.1f}" cy="5" r="3.5"/></svg>'
    )


def _sortable(value: float | None) -> str:
    return "" if value is None or not math.isfinite(value) else repr(float(value))
