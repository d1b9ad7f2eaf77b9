"""The tables of a comparison as texts, identical in all formats."""

from __future__ import annotations

from dataclasses import dataclass

from pema.evaluation.notation import metric_name
from pema.experiments.formats import (
    COSTS,
    NOT_HELPED,
    difference_text,
    missing_text,
    needs_text,
    no_help_text,
    score_cell,
)
from pema.experiments.records import Results


@dataclass(frozen=True)
class Cell:
    """A cell: its text, and whether it is the best of its column."""

    text: str
    best: bool = False


@dataclass(frozen=True)
class Table:
    """A table of a comparison.

    Attributes:
        title: its heading.
        columns: headings; the first column names the lines.
        rows: the cells of each line.
        notes: sentences below the table.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    notes: tuple[str, ...] = ()


def result_tables(results: Results) -> list[Table]:
    """Return quality with its 95 % interval, costs and needs, and the differences from each further reference."""
    references = [each for each in results.differences if each != results.about.reference]
    return [_quality(results), _costs(results), *(_differences(results, each) for each in references)]


def _quality(results: Results) -> Table:
    reference, test = results.about.reference, results.about.data.test
    rows = []
    for label, row in results.rows.items():
        cells = [Cell(f"{label} {NOT_HELPED}" if row.no_help else label)]
        for metric in results.metrics:
            interval = row.metrics[metric]
            difference = results.difference(reference, label, metric)
            cells.append(Cell(score_cell(metric, interval, difference, test), interval.mean == results.best(metric)))
        rows.append(tuple(cells))
    note = "Mean over seeds ± standard deviation (95 % interval over test sentences)"
    if reference is not None:
        note += f"; + better, - worse than {reference}, p < 0.05"
    notes = (f"{note}.", no_help_text(results.rows.values()), missing_text(results))
    return Table(results.about.title, ("", *map(metric_name, results.metrics)), tuple(rows), tuple(filter(None, notes)))


def _costs(results: Results) -> Table:
    columns = results.cost_columns(COSTS)
    rows = [
        (
            Cell(label),
            *(Cell(COSTS[name].text(results.cost(label, name))) for name in columns),
            Cell(needs_text(results.runs[label][0].needs)),
        )
        for label in results.rows
    ]
    heads = ("", *(COSTS[name].title for name in columns), "Needs")
    return Table(f"{results.about.title}: costs", heads, tuple(rows))


def _differences(results: Results, reference: str) -> Table:
    differences = results.differences[reference]
    rows = [
        (Cell(label), *(Cell(difference_text(metric, differences[label, metric])) for metric in results.metrics))
        for label in dict.fromkeys(label for label, _ in differences)
    ]
    return Table(
        f"{results.about.title}: difference from {reference}",
        ("", *map(metric_name, results.metrics)),
        tuple(rows),
        ("Difference of means (95 % interval over test sentences), p.",),
    )
