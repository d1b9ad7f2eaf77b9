"""Hypothesis files, aligned with their inputs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pema.files import writing


def write_hypotheses(path: Path, hypotheses: Sequence[str]) -> None:
    """Write one hypothesis per line, in UTF-8, atomically.

    Line separators of any kind (line feeds, U+2028 and similar) inside a hypothesis become spaces, so line i of the
    file belongs to line i of the input. `pema.tasks.readers.read_lines` reads the file back.

    Raises:
        StorageError: writing failed; an existing file is unchanged.
    """
    with writing(path) as temporary, temporary.open("w", encoding="utf-8", newline="\n") as file:
        file.writelines(" ".join(hypothesis.splitlines()) + "\n" for hypothesis in hypotheses)
