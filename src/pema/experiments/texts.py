"""The generated texts of a run: `RUN.txt` with one per line, or `RUN.jsonl` if one has several lines."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pema.evaluation.outputs import LINE_ENDS, read_hypotheses, write_hypotheses


def texts_file(folder: Path, run: str) -> Path:
    """Return the file of the texts of a run, which may be missing."""
    objects = folder / f"{run}.jsonl"
    return objects if objects.exists() else folder / f"{run}.txt"


def write_texts(folder: Path, run: str, texts: Sequence[str]) -> None:
    """Write the texts of a run, and remove those that an earlier run left in another format.

    Raises:
        StorageError: writing failed.
    """
    lines, objects = folder / f"{run}.txt", folder / f"{run}.jsonl"
    several = any(LINE_ENDS.search(text) for text in texts)
    write_hypotheses(objects if several else lines, texts)
    (lines if several else objects).unlink(missing_ok=True)


def read_texts(folder: Path, run: str) -> list[str]:
    """Read the texts of a run.

    Raises:
        DataError: they are missing or damaged.
    """
    return read_hypotheses(texts_file(folder, run))
