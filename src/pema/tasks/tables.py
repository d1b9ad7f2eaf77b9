r"""Rows of tab-separated files, as they stand or in quotation marks.

A file is *quoted*, as csv writers, pandas and spreadsheets leave it (RFC 4180), when every cell that holds a quotation
mark stands in quotation marks with those inside doubled, and one of these says that this is no chance:

- a cell in quotation marks holds a quotation mark (`"He said ""hello"" to me."`), a tab or a line break;
- all cells of the file, but numbers and empty ones, stand in quotation marks.

A quoted file means what its cells say without their quotation marks. Every other file is taken as it stands, quotation
marks included (a line such as `"Hello," he said.` of a corpus). A file some of whose cells can only be quoted and
others only stand as they are, or whose quotation marks are escaped by a backslash, is refused.
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
"""Lines that one cell may take; a quotation mark that nobody closes is no cell."""

CELL = re.compile(r'"((?:[^"]|"")*)"(?=\t|\Z)|([^"\t]*)(?=\t|\Z)')
NUMBER = re.compile(r"[+-]?(\d+(\.\d*)?|\.\d+)([eE][+-]?\d+)?")
BACKSLASHED = re.compile(r'"(?:[^"\\]|\\.)*\\"(?:[^"\\]|\\.)*"')
REMEDY = "Write all cells with a csv writer, or none of them; or write JSONL."

Row = tuple[int, list[str]]


def table_rows(path: Path) -> Iterator[Row]:
    """The number of the line that each row begins at, and its cells.

    Raises:
        DataError: the file cannot be read, or some of its cells are quoted and others are not.
    """
    if _is_quoted(path):
        for number, text in _logical(text_lines(path)):
            yield number, _cells(text) or []
    else:
        for number, line in text_lines(path):
            yield number, line.split(TAB)


@dataclass
class _Seen:
    """What the lines of a file, taken singly, say of it.

    Attributes:
        width: columns of the first line.
        ragged: whether another line has more or fewer.
        all_quoted: whether every cell, but numbers and empty ones, stands in quotation marks.
        needy: the first line with a cell in quotation marks that holds some; 0 where there is none.
    """

    width: int = 0
    ragged: bool = False
    all_quoted: bool = True
    needy: int = 0

    def look(self, number: int, cells: list[str], path: Path) -> None:
        """Look at a line that is not blank."""
        self.width = self.width or len(cells)
        self.ragged |= len(cells) != self.width
        for cell in cells:
            quoted = CELL.fullmatch(cell) if cell.startswith(QUOTE) else None
            if quoted is not None:
                if not self.needy and (QUOTE in quoted[1] or "\r" in quoted[1]):
                    self.needy = number
            elif BACKSLASHED.fullmatch(cell):
                raise DataError(
                    f"{path}:{number}: a cell escapes its quotation marks by a backslash: double them. {REMEDY}"
                )
            else:
                self.all_quoted &= not cell or NUMBER.fullmatch(cell) is not None


def _is_quoted(path: Path) -> bool:
    """Whether a file is quoted, after a look at all of it.

    Raises:
        DataError: it is quoted in one place and cannot be in another.
    """
    seen, width, wrong = _Seen(), 0, 0

    def looked_at() -> Iterator[tuple[int, str]]:
        for number, line in text_lines(path):
            if line:
                seen.look(number, line.split(TAB), path)
            yield number, line

    for number, text in _logical(looked_at()):
        cells = _cells(text)
        if text and not wrong:
            width = width or len(cells or ())
            wrong = number if cells is None or len(cells) != width else 0
    if not wrong:
        return bool(seen.needy) or seen.all_quoted or seen.ragged or width != seen.width
    if seen.needy:
        raise DataError(
            f"{path}:{seen.needy}: a cell is quoted as by a csv writer, and line {wrong} is not: it has other columns, "
            f"or quotation marks as they stand. {REMEDY}"
        )
    return False


def _logical(lines: Iterable[tuple[int, str]]) -> Iterator[tuple[int, str]]:
    """Rows that may run over several lines: a row ends where its quotation marks are even in number."""
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
    """The cells of a quoted row; None where it is none."""
    cells, place = [], 0
    while True:
        match = CELL.match(text, place)
        if match is None or not (match.end() == len(text) or text[match.end()] == TAB):
            return None
        cells.append(match[2] if match[1] is None else match[1].replace('""', QUOTE))
        if match.end() == len(text):
            return cells
        place = match.end() + 1
