"""Hypotheses on the disk, aligned with their inputs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pema.files import writing


def write_hypotheses(path: Path, hypotheses: Sequence[str]) -> None:
    """Write one hypothesis a line, in UTF-8, whole or not at all.

    Whatever ends a line for some reader (line feeds, U+2028 and their like) becomes a space inside a hypothesis, so
    line i of the file belongs to line i of the input. `pema.tasks.readers.read_lines` reads them back.

    Raises:
        StorageError: the disk refused; what stood there before is untouched.
    """
    with writing(path) as temporary, temporary.open("w", encoding="utf-8", newline="\n") as file:
        file.writelines(" ".join(hypothesis.splitlines()) + "\n" for hypothesis in hypotheses)
