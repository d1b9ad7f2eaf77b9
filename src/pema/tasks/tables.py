r"""Rows of tab-separated files, literal or quoted.

A file is *quoted*, as csv writers, pandas and spreadsheets write it (RFC 4180), if every cell that contains a quotation
mark is enclosed in quotation marks with the inner ones doubled, and one of these shows that this is no coincidence:

- a quoted cell contains a quotation mark (`"He said ""hello"" to me."`), a tab or a line break;
- all cells of the file, except numbers and empty cells, are quoted.

The cells of a quoted file are read without their quotation marks. Every other file is literal: quotation marks are part
of the text (a corpus line such as `"Hello," he said.`). A file that mixes quoted and literal cells, or escapes
quotation marks by a backslash, is refused.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from pema.errors import DataError
from pema.tasks.lines import text_lines

TAB, QUOTE = "\t", '"'
LONGEST = 1_000
"""Maximum number of lines per cell; a longer one is an unclosed quotation mark."""

CELL = re.compile(r'"((?:[^"]|"")*)"(?=\t|\Z)|([^"\t]*)(?=\t|\Z)')
NUMBER = re.compile(r"[+-]?(\d+(\.\d*)?|\.\d+)([eE][+-]?\d+)?")
BACKSLASHED = re.compile(r'"(?:[^"\\]|\\.)*\\"(?:[^"\\]|\\.)*"')
REMEDY = "Write all cells with a csv writer, or none of them, or write JSONL."

Row = tuple[int, list[str]]


def table_rows(path: Path) -> Iterator[Row]:
    """Yield the cells of each row with the number of its first line.

    Raises:
        DataError: the file cannot be read, or it mixes quoted and literal cells.
    """
    if _is_quoted(path):
        for number, text in _logical(text_lines(path)):
            yield number, _cells(text) or []
    else:
        for number, line in text_lines(path):
            yield number, line.split(TAB)


@dataclass
class _Seen:
    """Evidence about quoting, collected line by line.

    Attributes:
        width: number of columns in the first line.
        ragged: whether another line has more or fewer columns.
        all_quoted: whether every cell, except numbers and empty cells, is quoted.
        needy: number of the first line with a quoted cell that contains quotation marks; 0 if there is none.
        escaped: number of the first line with a cell whose quotation marks are escaped by a backslash; 0 if there is
            none. It may be part of a quoted cell with several lines.
    """

    width: int = 0
    ragged: bool = False
    all_quoted: bool = True
    needy: int = 0
    escaped: int = 0

    def look(self, number: int, cells: list[str]) -> None:
        """Update the evidence with a line that is not blank."""
        self.width = self.width or len(cells)
        self.ragged |= len(cells) != self.width
        for cell in cells:
            quoted = CELL.fullmatch(cell) if cell.startswith(QUOTE) else None
            if quoted is not None:
                if not self.needy and (QUOTE in quoted[1] or "\r" in quoted[1]):
                    self.needy = number
            elif BACKSLASHED.fullmatch(cell):
                self.escaped = self.escaped or number
            else:
                self.all_quoted &= not cell or NUMBER.fullmatch(cell) is not None


def _is_quoted(path: Path) -> bool:
    """Return whether a file is quoted; the whole file is read.

    Raises:
        DataError: the file mixes quoted and literal cells.
    """
    seen, width, wrong = _Seen(), 0, 0

    def looked_at() -> Iterator[tuple[int, str]]:
        for number, line in text_lines(path):
            if line:
                seen.look(number, line.split(TAB))
            yield number, line

    for number, text in _logical(looked_at()):
        cells = _cells(text)
        if text and not wrong:
            width = width or len(cells or ())
            wrong = number if cells is None or len(cells) != width else 0
    if not wrong:
        return bool(seen.needy or seen.escaped) or seen.all_quoted or seen.ragged or width != seen.width
    if seen.escaped:
        raise DataError(
            f"{path}:{seen.escaped}: a cell escapes its quotation marks by a backslash: double them. {REMEDY}"
        )
    if seen.needy:
        raise DataError(
            f"{path}:{seen.needy}: a cell is quoted as by a csv writer, but line {wrong} is not: it has a different "
            f"number of columns, or literal quotation marks. {REMEDY}"
        )
    return False


def _logical(lines: Iterable[tuple[int, str]]) -> Iterator[tuple[int, str]]:
    """Join lines into rows: a row ends where it has an even number of quotation marks."""
    begun, odd = 0, False
    parts: list[str] = []
    for number, line in lines:
        begun = begun if parts else number
        parts.append(line)
        odd ^= line.count(QUOTE) % 2 == 1
        if not odd or len(parts) > LONGEST:
            yield begun, "\n".join(parts)
            parts, odd = [], False
    if parts:
        yield begun, "\n".join(parts)


def _cells(text: str) -> list[str] | None:
    """Return the cells of a quoted row; None if the row is not quoted."""
    if QUOTE not in text:
        return text.split(TAB)
    cells, place = [], 0
    while True:
        match = CELL.match(text, place)
        if match is None or not (match.end() == len(text) or text[match.end()] == TAB):
            return None
        cells.append(match[2] if match[1] is None else match[1].replace('""', QUOTE))
        if match.end() == len(text):
            return cells
        place = match.end() + 1
