"""Rows of text files: JSONL, JSON lists, CSV and TSV."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

from pema.errors import DataError
from pema.tasks.lines import text_lines
from pema.tasks.shapes import SHAPES
from pema.tasks.tables import table_rows
from pema.tasks.values import listed

Rows = Iterator[tuple[str, Any]]
"""The place of each row, "file:line" or "file, row n", and the row."""

SEPARATORS = {",": "commas", ";": "semicolons", "\t": "tabs"}
LONGEST_CELL = 1 << 30
"""Maximum number of characters of a CSV cell; the csv module's own default is 128 KiB."""

FIRST_ROWS = 100
"""Number of rows that tell what separates the cells."""

ANNOUNCED = re.compile(r"sep=([,;\t])")
"""The line with which some programs tell Excel the separator, before the first row."""


@dataclass(frozen=True)
class Table:
    """Rows that can be read once.

    Attributes:
        name: for messages.
        read: returns the rows, with only the columns that it is given, or all; called once.
        columns: the columns of every row; None if only the rows tell.
        features: the types of the columns of a Hugging Face data set, which name its classes.
        numbered: whether the columns have numbers for names, so that the first line is a row.
    """

    name: str
    read: Callable[[Sequence[str] | None], Rows]
    columns: tuple[str, ...] | None = None
    features: Any = None
    numbered: bool = False


def json_table(path: Path) -> Table:
    """Return the rows of a JSONL file, or of a JSON list of objects."""
    return Table(str(path), lambda _: _json_rows(path))


def _json_rows(path: Path) -> Rows:
    lines = text_lines(path)
    for number, line in lines:
        if line.isspace() or not line:
            continue
        rest = chain([(number, line)], lines)
        yield from _list_rows(path, number, rest) if line.lstrip().startswith("[") else _line_rows(path, rest)


def _line_rows(path: Path, lines: Iterator[tuple[int, str]]) -> Rows:
    loads = json.loads
    for number, line in lines:
        try:
            row = loads(line)
        except json.JSONDecodeError as error:
            if not line or line.isspace():
                continue
            raise _malformed(path, number, error, "Write one object per line, or a list of objects.") from error
        except RecursionError as error:
            raise DataError(f"{path}:{number}: JSON nested too deeply.") from error
        yield f"{path}:{number}", row


def _list_rows(path: Path, first: int, lines: Iterator[tuple[int, str]]) -> Rows:
    """Yield the items of a list, which are decoded one by one."""
    text = "\n".join(line for _, line in lines)
    decode, place, row = json.JSONDecoder().raw_decode, text.index("[") + 1, 0
    try:
        while True:
            place = _skip(text, place)
            if text[place : place + 1] == "]" and not row:
                break
            value, place = decode(text, place)
            yield f"{path}, row {row}", value
            row, place = row + 1, _skip(text, place)
            if text[place : place + 1] == "]":
                break
            if text[place : place + 1] != ",":
                raise json.JSONDecodeError("expected ',' or ']' after an item of the list", text, place)
            place += 1
        end = _skip(text, place + 1)
        if end < len(text):
            raise json.JSONDecodeError("expected nothing after the list", text, end)
    except json.JSONDecodeError as error:
        number = first + error.lineno - 1
        raise _malformed(path, number, error, "Write one list of objects, or one object per line.") from error
    except RecursionError as error:
        raise DataError(f"{path}, row {row}: JSON nested too deeply.") from error


def _skip(text: str, place: int) -> int:
    """Return the next place that is not white space."""
    while text[place : place + 1] in (" ", "\t", "\n", "\r"):
        place += 1
    return place


def _malformed(path: Path, number: int, error: json.JSONDecodeError, remedy: str) -> DataError:
    return DataError(f"{path}:{number}: not JSON, column {error.colno}: {error.msg}. {remedy}")


def tsv_table(path: Path, fields: tuple[str, str] | None) -> Table:
    """Return the rows of a TSV file, whose first line names the columns, or which has two columns without names.

    Args:
        path: the file.
        fields: columns or column numbers of source and target, or None.

    Raises:
        DataError: the file cannot be read, or the columns are not there.
    """
    rows = table_rows(path)
    number, header = next(rows)
    if not _is_header(header, fields):
        if fields is None and len(header) != 2:
            raise DataError(
                f"{path}:{number}: {len(header)} columns, and no names that are known: expected two columns (source "
                f"and target, separated by tabs), or a first line that names them; it contains {listed(header)}. "
                f"Name two of its columns, or give their numbers (source_field, target_field)."
            )
        names = ("source", "target") if fields is None else ()
        return _sheet(path, names, chain([(number, header)], rows), "tabs")
    return _sheet(path, header, rows, "tabs")


def csv_table(path: Path, fields: tuple[str, str] | None) -> Table:
    """Return the rows of a CSV file, whose first line names the columns; see `tsv_table`.

    Cells are separated by commas, semicolons or tabs. If the first line contains several of these, the one that divides
    the first rows into the same number of cells is the separator.
    """
    first = next(text_lines(path))[1]
    announced = ANNOUNCED.fullmatch(first)
    separator = announced[1] if announced else _separator(path, first, fields)
    rows = _csv_rows(path, separator)
    if announced:
        next(rows)
    number, header = next(rows, (1, []))
    if _are_numbers(fields) and not set(fields or ()) <= set(header):
        return _sheet(path, (), chain([(number, header)], rows), SEPARATORS[separator])
    return _sheet(path, header, rows, SEPARATORS[separator])


def _csv_rows(path: Path, separator: str) -> Iterator[tuple[int, list[str]]]:
    csv.field_size_limit(max(csv.field_size_limit(), LONGEST_CELL))
    # A line break inside a cell is a line feed, whatever ends the lines of the file.
    lines = (f"{line}\n" for _, line in text_lines(path))
    reader = csv.reader(lines, delimiter=separator, strict=True)
    number = 1
    try:
        for cells in reader:
            if cells:
                yield number, cells
            number = reader.line_num + 1
    except csv.Error as error:
        why = "a carriage return outside quotation marks" if "new-line character" in str(error) else error
        raise DataError(
            f"{path}:{number}: the row that begins here is not CSV ({why}): enclose a cell that contains quotation "
            "marks, separators or line breaks in quotation marks, and double those inside."
        ) from error


def _separator(path: Path, first: str, fields: tuple[str, str] | None) -> str:
    """Return what separates the cells of a file.

    Raises:
        DataError: the first rows do not tell, and no names of columns can show that it was the wrong one.
    """
    possible = [separator for separator in SEPARATORS if separator in first]
    if len(possible) < 2:
        return next(iter(possible), ",")
    even = [separator for separator in possible if _is_even(path, separator)]
    if len(even) == 1:
        return even[0]
    if _are_numbers(fields):
        raise DataError(
            f"{path}: the cells may be separated by {' or '.join(SEPARATORS[each] for each in possible)}, and the "
            "first rows do not tell: enclose the cells in quotation marks, or name the columns in the first line."
        )
    return (even or possible)[0]


def _is_even(path: Path, separator: str) -> bool:
    """Return whether a separator divides the first rows into the same number of cells, more than one."""
    try:
        widths = {len(cells) for _, cells in islice(_csv_rows(path, separator), FIRST_ROWS)}
    except DataError:
        return False
    return len(widths) == 1 and widths != {1}


def _are_numbers(fields: tuple[str, str] | None) -> bool:
    return fields is not None and all(field.isdecimal() and int(field) > 0 for field in fields)


def _is_header(cells: Sequence[str], fields: tuple[str, str] | None) -> bool:
    """Return whether the first line names the columns.

    Raises:
        DataError: a column is named that is not there.
    """
    if fields is None:
        return any(shape.fits(cells) for shape in SHAPES)
    return not _are_numbers(fields) or set(fields) <= set(cells)


def _sheet(path: Path, names: Sequence[str], rows: Iterator[tuple[int, list[str]]], separated: str) -> Table:
    """Return rows of cells as rows with named columns; without names, the columns are numbered from 1."""

    def read(_: Sequence[str] | None) -> Rows:
        width = len(names)
        for number, cells in rows:
            if names and len(cells) != width:
                raise DataError(f"{path}:{number}: {len(cells)} columns, expected {width} (separated by {separated}).")
            columns = names or [str(i + 1) for i in range(len(cells))]
            yield f"{path}:{number}", dict(zip(columns, cells, strict=True))

    return Table(str(path), read, tuple(names) or None, numbered=not names)
