"""Hypotheses on the disk, aligned with their inputs: one per line of a text file, or one JSON object per line."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pema.console import note
from pema.errors import ConfigError, DataError
from pema.files import parse_json, writing
from pema.schema import short
from pema.tasks.lines import stem, text_lines
from pema.tasks.readers import read_lines

JSON_LINES = (".jsonl", ".ndjson")
TEXT = "text"
"""Field of a hypothesis in JSON Lines."""

OTHER = (".json", ".tsv", ".tab", ".csv", ".parquet", ".gz", ".bz2", ".xz")
"""Endings of formats that are not written."""

LINE_ENDS = re.compile("[\n\r\x0b\x0c\x1c-\x1e\x85\u2028\u2029]")
"""The characters at which readers of any kind end a line."""


def is_json_lines(path: Path) -> bool:
    """Return whether the name of a file says that it contains one JSON object per line."""
    return stem(path).endswith(JSON_LINES)


def require_writable(path: Path) -> None:
    """Refuse the name of an output whose format is not written.

    Raises:
        ConfigError: the name ends like another format.
    """
    if path.name.lower().endswith(OTHER):
        raise ConfigError(f"{path}: outputs are text (one per line) or JSON Lines: name it .txt or .jsonl.")


def write_hypotheses(path: Path, hypotheses: Iterable[str], details: Sequence[Mapping[str, Any]] | None = None) -> None:
    r"""Write hypotheses in UTF-8, atomically: line i belongs to input i.

    To a file in JSON Lines (`.jsonl`, `.ndjson`) each is an object with the field `text`, and texts of several lines
    stay so. In any other file each is a line, and line breaks of any kind (U+2028 and similar ones too) are written as
    escape sequences (`\n`), which a note reports. `read_hypotheses` reads both.

    Args:
        path: the file.
        hypotheses: the texts.
        details: further fields of each object, in front of `text`.

    Raises:
        StorageError: writing failed; an existing file is unchanged.
    """
    escaped = 0
    with writing(path) as temporary, temporary.open("w", encoding="utf-8", newline="\n") as file:
        for i, text in enumerate(hypotheses):
            if is_json_lines(path):
                row = {**(details[i] if details else {}), TEXT: text}
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
                continue
            line = LINE_ENDS.sub(lambda match: repr(match[0])[1:-1], text)
            escaped += line != text
            file.write(line + "\n")
    if escaped:
        note(
            rf"{path}: line breaks are written as \n in {escaped:,} texts of several lines: name the file .jsonl to "
            "keep them."
        )


def require_line_breaks(path: Path, hypotheses: Sequence[str], references: Sequence[tuple[str, ...]]) -> None:
    r"""Refuse hypotheses whose line breaks were written as `\n`, if the references have line breaks.

    Args:
        path: the file that they were read from.
        hypotheses: the texts.
        references: the valid texts of each.

    Raises:
        DataError: a text contains `\n` as two characters, which the metrics would count as wrong.
    """
    if is_json_lines(path) or not any("\n" in each for several in references for each in several):
        return
    for number, text in enumerate(hypotheses, 1):
        if "\\n" in text:
            raise DataError(
                f"{path}:{number}: contains \\n as two characters, as texts of several lines are written to a text "
                "file, and the references have line breaks: generate into a .jsonl file."
            )


def read_hypotheses(path: Path, field: str = TEXT) -> list[str]:
    """Read one text per line: a field of each object of a file in JSON Lines, or each line of a text file.

    Raises:
        DataError: the file is missing, empty, malformed or in another format.
    """
    if not is_json_lines(path):
        if stem(path).endswith(OTHER):
            raise DataError(f"{path}: texts are read from text (one per line) or JSON Lines: write it as .jsonl.")
        return read_lines(path)
    texts = []
    for number, line in text_lines(path):
        where = f"{path}:{number}"
        text = parse_json(line.encode(), where).get(field)
        if not isinstance(text, str):
            raise DataError(f"{where}: no text in the field {field!r}: {short(line)}.")
        texts.append(text)
    return texts
