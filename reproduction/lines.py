"""Committed results: one file of JSON lines per experiment, one line per run.

A line with the field `run` is the result of that run, with its signature. The file of a comparison has further lines:
`experiment` (the facts common to all runs), `comparison` (the results on the test examples) and, if their licence
allows it, `examples`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pema.errors import DataError
from pema.files import parse_json, writing

RUN = "run"
"""Field with the name of a run."""

TEXTS, LABELS = "texts", "labels"
"""Fields with the hypotheses of a run, and with its labels if some were chosen by likelihood."""

SUFFIX = ".jsonl"


def files(folder: Path) -> list[Path]:
    """Return the files of results in a folder, sorted by the names of their experiments."""
    return sorted(folder.glob(f"*{SUFFIX}"), key=lambda file: file.stem)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Read every line of a file.

    Raises:
        DataError: the file cannot be read, or a line is not a JSON object; the message names the line.
    """
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}. Run the experiment, or restore the file.") from error
    return [parse_json(line, f"{path}, line {number}") for number, line in enumerate(lines, start=1)]


def write_lines(path: Path, lines: Iterable[Mapping[str, Any]]) -> None:
    """Write a file, atomically."""
    text = "".join(json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n" for line in lines)
    path.parent.mkdir(parents=True, exist_ok=True)
    with writing(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")


def read_runs(path: Path) -> dict[str, dict[str, Any]]:
    """Read the runs of a file by name, in the order of its lines; none if there is no file.

    Raises:
        DataError: see `read_lines`; or two lines belong to the same run.
    """
    runs: dict[str, dict[str, Any]] = {}
    for line in read_lines(path) if path.exists() else ():
        if RUN in line:
            if line[RUN] in runs:
                raise DataError(f"{path} contains the run {line[RUN]!r} twice. Remove one of the lines.")
            runs[line[RUN]] = line
    return runs


def put_run(path: Path, name: str, result: Mapping[str, Any]) -> None:
    """Write the result of a run into a file of runs: in place of its previous result, else at the end."""
    write_lines(path, (read_runs(path) | {name: {RUN: name, **result}}).values())
