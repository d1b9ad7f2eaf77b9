"""The tables of comparisons as Markdown, LaTeX and CSV."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable, Sequence

from pema.experiments.formats import COSTS
from pema.experiments.records import Results
from pema.experiments.tables import Cell, Table, result_tables

LATEX = {
    "\\": r"\textbackslash{}",
    "{": r"\{",
    "}": r"\}",
    "$": r"\$",
    "&": r"\&",
    "#": r"\#",
    "%": r"\%",
    "_": r"\_",
    "^": r"\textasciicircum{}",
    "~": r"\textasciitilde{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    '"': r"\textquotedbl{}",
    "±": r"$\pm$",
    "†": r"$\dagger$",
    "–": "--",
}
"""LaTeX of characters that are commands, or that fonts may lack."""


def markdown(experiments: Iterable[Results]) -> str:
    """Write all tables in Markdown, under a heading each."""
    return "\n".join(_markdown(table) for results in experiments for table in result_tables(results))


def latex(experiments: Iterable[Results]) -> str:
    """Write all tables in LaTeX, to be included in a document that uses the package booktabs."""
    tables = [_latex(table) for results in experiments for table in result_tables(results)]
    return "\n".join(["% \\usepackage{booktabs}", *tables])


def comma_separated(experiments: Sequence[Results]) -> str:
    """Write all numbers of all tables as one CSV table with a row for each line of each experiment.

    Numbers are not rounded, and costs are in bytes and seconds. A column that an experiment lacks is empty.
    """
    rows = [_numbers(results, label) for results in experiments for label in results.rows]
    columns = list(dict.fromkeys(name for row in rows for name in row))
    output = io.StringIO()
    writer = csv.DictWriter(output, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return output.getvalue()


def _markdown(table: Table) -> str:
    def line(cells: Iterable[str]) -> str:
        return f"| {' | '.join(cells)} |"

    rules = ["---", *["--:"] * (len(table.columns) - 1)]
    rows = [line(_markdown_cell(cell) for cell in row) for row in table.rows]
    heads = line(map(_markdown_text, table.columns))
    notes = "".join(f"\n{_markdown_text(note)}\n" for note in table.notes)
    return "\n".join([f"## {_markdown_text(table.title)}\n", heads, line(rules), *rows]) + f"\n{notes}"


def _markdown_cell(cell: Cell) -> str:
    text = _markdown_text(cell.text)
    return f"**{text}**" if cell.best else text


def _markdown_text(text: str) -> str:
    return re.sub(r"([\\`*_\[\]<>|#])", r"\\\1", " ".join(text.split()))


def _latex(table: Table) -> str:
    def line(cells: Iterable[str]) -> str:
        return " & ".join(cells) + r" \\"

    rows = [line(_latex_cell(cell) for cell in row) for row in table.rows]
    notes = [f"\\par\\smallskip\\footnotesize {_latex_text(' '.join(table.notes))}"] if table.notes else []
    return "\n".join(
        [
            r"\begin{table}",
            r"\centering",
            f"\\caption{{{_latex_text(table.title)}}}",
            f"\\begin{{tabular}}{{l{'r' * (len(table.columns) - 1)}}}",
            r"\toprule",
            line(map(_latex_text, table.columns)),
            r"\midrule",
            *rows,
            r"\bottomrule",
            r"\end{tabular}",
            *notes,
            r"\end{table}",
            "",
        ]
    )


def _latex_cell(cell: Cell) -> str:
    text = _latex_text(cell.text)
    return f"\\textbf{{{text}}}" if cell.best else text


def _latex_text(text: str) -> str:
    return "".join(LATEX.get(character, character) for character in " ".join(text.split()))


def _numbers(results: Results, label: str) -> dict[str, float | int | str | None]:
    """Return the numbers of a line by the name of their column."""
    row = results.rows[label]
    values: dict[str, float | int | str | None] = {
        "experiment": results.about.name,
        "label": label,
        "method": results.runs[label][0].method,
        "seeds": row.seeds,
        "test_texts": results.about.data.test,
        "runs_not_helped_by_training": len(row.no_help or ()),
    }
    for metric in results.metrics:
        interval = row.metrics[metric]
        values[metric] = interval.mean
        values |= {f"{metric} {name}": getattr(interval, name) for name in ("std", "low", "high")}
        if any(each.metrics[metric].texts is not None for each in results.rows.values()):
            values[f"{metric} texts"] = interval.texts
        for reference in results.differences:
            difference = results.difference(reference, label, metric)
            prefix = f"{metric} minus {reference}"
            for name, field in (("", "difference"), (" low", "low"), (" high", "high"), (" p", "p_value")):
                values[f"{prefix}{name}"] = None if difference is None else getattr(difference, field)
    values |= {name: results.cost(label, name) for name in results.cost_columns(COSTS)}
    needs = results.runs[label][0].needs
    return values | {f"needs_{name}": str(value).lower() for name, value in vars(needs).items()}
