"""Committed results: one file of JSON lines an experiment, one line a run.

A line that has a `run` is the result of the run of that name, with its signature. A comparison's file holds lines of
its own for `experiment` (what all runs have in common), `comparison` (what was found on the test examples) and, where
their licence allows it, `examples`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pema.errors import DataError
from pema.files import parse_json, writing

RUN = "run"
"""The field with a run's name."""

TEXTS = "texts"
"""The field with a run's hypotheses."""

SUFFIX = ".jsonl"


def files(folder: Path) -> list[Path]:
    """The files of results in a folder, in the order of their experiments' names."""
    return sorted(folder.glob(f"*{SUFFIX}"), key=lambda file: file.stem)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Read every line of a file.

    Raises:
        DataError: the file cannot be read, or a line is no JSON object; the message names the line.
    """
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}. Run the experiment, or restore the file.") from error
    return [parse_json(line, f"{path}, line {number}") for number, line in enumerate(lines, start=1)]


def write_lines(path: Path, lines: Iterable[Mapping[str, Any]]) -> None:
    """Write a file, whole or not at all."""
    text = "".join(json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n" for line in lines)
    path.parent.mkdir(parents=True, exist_ok=True)
    with writing(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")


def read_runs(path: Path) -> dict[str, dict[str, Any]]:
    """Read the runs of a file by name, in the order of its lines; none where there is no file.

    Raises:
        DataError: see `read_lines`; or two lines are of one run.
    """
    runs: dict[str, dict[str, Any]] = {}
    for line in read_lines(path) if path.exists() else ():
        if RUN in line:
            if line[RUN] in runs:
                raise DataError(f"{path} holds the run {line[RUN]!r} twice. Remove one of the lines.")
            runs[line[RUN]] = line
    return runs


def put_run(path: Path, name: str, result: Mapping[str, Any]) -> None:
    """Write the result of a run into a file of runs: in its old place where the file has one, else at the end."""
    write_lines(path, (read_runs(path) | {name: {RUN: name, **result}}).values())
