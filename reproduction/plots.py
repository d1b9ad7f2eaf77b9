"""Plots of studies as SVG files, identical to the byte for equal results and version of matplotlib."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any, Literal

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter

from pema.experiments.records import Results
from reproduction.tables.results import DEV, Line, lines_of, title_of

STYLE: dict[Any, Any] = {
    "svg.hashsalt": "pema",  # ids of the elements; random without it
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans", "Verdana", "Arial", "Helvetica"],
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e4e4e4",
    "axes.axisbelow": True,
    "legend.frameon": False,
    # An opaque panel, so that it can also be read on a dark page.
    "figure.facecolor": "#ffffff",
    "savefig.facecolor": "#ffffff",
}
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")  # Okabe and Ito: safe for the colour-blind
MARKERS = ("o", "s", "^", "D", "v", "P")
GREY = "#555555"
WIDE = 10  # from this ratio of the greatest to the least on, an axis is logarithmic
AXES = {
    "rank": "rank r",
}
"""Titles of horizontal axes that are not the setting's name."""


def line_plot(results: Results, x: str) -> bytes:
    """Plot every measure against a swept setting, with one line per other setting.

    Args:
        results: of the study.
        x: the setting on the horizontal axis; what lacks it is a level.
    """
    lines = lines_of(results)
    measures = _measures(results)
    columns = 3 if len(measures) == 3 else 2
    rows = -(-len(measures) // columns)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(8, 2.3 * rows + 0.5), layout="constrained")
        grid = figure.subplots(rows, columns, squeeze=False, sharex=True)
        names = list(dict.fromkeys(line.named_without(x) for line in lines if not line.is_plm))
        for axes, measure in zip(grid.flat, measures, strict=False):
            _draw_lines(axes, lines, measure, x, names)
            axes.set_title(title_of(measure))
        for axes in grid.flat[len(measures) :]:
            axes.set_visible(False)
        last = len(measures) - columns
        for axes in grid.flat[max(0, last) : len(measures)]:
            axes.set_xlabel(AXES.get(x, x))
            axes.tick_params(labelbottom=True)
        handles = {
            label: handle for axes in grid.flat for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
        }
        columns = len(handles) if len(handles) < 5 else 3
        figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=columns)
        return _svg(figure, results)


def _draw_lines(axes: Axes, lines: Sequence[Line], measure: str, x: str, names: Sequence[str]) -> None:
    points: dict[str, list[tuple[float, float, float]]] = {}
    for line in lines:
        name, at, mean = line.named_without(x), line.setting(x), line.mean(measure)
        if mean is None:
            continue
        if at is not None:
            points.setdefault(name, []).append((at, mean, line.spread(measure) or 0.0))
        elif line.is_plm:
            axes.axhline(mean, color=GREY, linestyle="--", linewidth=1.2, label=line.label)
        else:
            colour, spread = COLOURS[names.index(name) % len(COLOURS)], line.spread(measure) or 0.0
            axes.axhline(mean, color=colour, linestyle="-.", linewidth=1.4, label=name)
            axes.axhspan(mean - spread, mean + spread, color=colour, alpha=0.12, linewidth=0)
    for name, values in points.items():
        k = names.index(name)
        where, means, spreads = zip(*sorted(values), strict=True)
        look: dict[str, Any] = {"color": COLOURS[k % len(COLOURS)], "marker": MARKERS[k % len(MARKERS)]}
        axes.errorbar(where, means, yerr=spreads, capsize=3, markersize=4.5, linewidth=1.4, label=name, **look)
    ticks = sorted({at for line in lines if (at := line.setting(x)) is not None})
    if ticks and ticks[0] > 0 and ticks[-1] / ticks[0] >= WIDE / 2:
        axes.set_xscale("log")
    axes.set_xticks(ticks, [f"{tick:,.3g}" if tick < 1000 else f"{tick:,.0f}" for tick in ticks])
    axes.minorticks_off()
    if measure == DEV:
        _wide(axes, lines, "y")


def _wide(axes: Axes, lines: Sequence[Line], which: Literal["x", "y"]) -> None:
    means = [mean for line in lines if (mean := line.mean(DEV)) is not None]
    if means and max(means) > WIDE * min(means):
        axes.set(**{f"{which}scale": "log"})
        axis = axes.xaxis if which == "x" else axes.yaxis
        for kind in (axis.set_major_formatter, axis.set_minor_formatter):
            kind(LogFormatter(labelOnlyBase=False, minor_thresholds=(1.5, 0.6)))


def dot_plot(results: Results) -> bytes:
    """Plot every measure of every method; the PLM alone is a vertical line."""
    lines = [line for line in lines_of(results) if not line.is_plm]
    measures = _measures(results)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(9, 0.32 * len(lines) + 1.3), layout="constrained")
        row = figure.subplots(1, len(measures), squeeze=False, sharey=True)[0]
        for axes, measure in zip(row, measures, strict=True):
            for line in lines_of(results):
                mean, spread = line.mean(measure), line.spread(measure) or 0.0
                if mean is None:
                    continue
                if line.is_plm:
                    axes.axvline(mean, color=GREY, linestyle="--", linewidth=1.2, label=line.label)
                    continue
                place = lines.index(line)
                axes.errorbar(
                    mean, place, xerr=spread, color=COLOURS[0], marker=MARKERS[0], capsize=3, markersize=5, linestyle=""
                )
            axes.set_title(title_of(measure))
            axes.margins(x=0.15)
            if measure == DEV:
                _wide(axes, lines_of(results), "x")
        row[0].set_yticks(range(len(lines)), [line.label for line in lines])
        row[0].set_ylim(len(lines) - 0.5, -0.5)
        handles, labels = row[0].get_legend_handles_labels()
        if handles:
            figure.legend(handles, labels, loc="outside lower center")
        return _svg(figure, results)


def _measures(results: Results) -> list[str]:
    """Return the metrics on test, then the perplexity on dev."""
    return [*results.metrics, DEV]


def _svg(figure: Figure, results: Results) -> bytes:
    written = io.BytesIO()
    FigureCanvasSVG(figure).print_svg(  # type: ignore[no-untyped-call]
        written, metadata={"Title": results.about.title, "Date": None, "Creator": None}
    )
    return written.getvalue()
