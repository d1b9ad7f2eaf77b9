"""The tables of a comparison for a terminal."""

from __future__ import annotations

from pathlib import Path

from rich import table as rich
from rich.text import Text

from pema.experiments.reader import read_folder
from pema.experiments.tables import Table, result_tables


def comparison_tables(folder: Path) -> list[rich.Table]:
    """Return the tables of a folder of results, ready to print.

    Raises:
        DataError: the folder contains no results, or they are damaged.
    """
    return [rich_table(each) for each in result_tables(read_folder(folder))]


def rich_table(table: Table) -> rich.Table:
    """Return a table for a terminal."""
    # Titles and labels are the user's text, which may look like rich's markup.
    drawn = rich.Table(title=Text(table.title), caption=Text("\n".join(table.notes)))
    for column, heading in enumerate(table.columns):
        drawn.add_column(Text(heading), justify="right" if column else "left")
    for row in table.rows:
        drawn.add_row(*(Text(cell.text, style="bold" if cell.best else "") for cell in row))
    return drawn
