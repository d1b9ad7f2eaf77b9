"""The generated texts of a run: `RUN.txt` with one per line, or `RUN.jsonl` if one has several lines or a label."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pema.errors import DataError
from pema.evaluation.outputs import LINE_ENDS, read_hypotheses, write_hypotheses

LABEL = "label"
"""Field of the label that was chosen by likelihood, beside the generated text."""


def texts_file(folder: Path, run: str) -> Path:
    """Return the file of the texts of a run, which may be missing."""
    objects = folder / f"{run}.jsonl"
    return objects if objects.exists() else folder / f"{run}.txt"


def write_texts(folder: Path, run: str, texts: Sequence[str], labels: Sequence[str] | None = None) -> None:
    """Write the texts of a run, and remove those that an earlier run left in another format.

    Args:
        folder: folder of the results.
        run: name of the run.
        texts: the generated texts.
        labels: the labels chosen by likelihood, aligned with the texts.

    Raises:
        StorageError: writing failed.
    """
    lines, objects = folder / f"{run}.txt", folder / f"{run}.jsonl"
    rows = labels is not None or any(LINE_ENDS.search(text) for text in texts)
    write_hypotheses(objects if rows else lines, texts, [{LABEL: label} for label in labels or ()])
    (lines if rows else objects).unlink(missing_ok=True)


def read_texts(folder: Path, run: str) -> list[str]:
    """Read the texts of a run.

    Raises:
        DataError: they are missing or damaged.
    """
    return read_hypotheses(texts_file(folder, run))


def read_labels(folder: Path, run: str) -> list[str]:
    """Read the labels of a run that were chosen by likelihood.

    Raises:
        DataError: they are missing or damaged.
    """
    file = folder / f"{run}.jsonl"
    if not file.exists():
        raise DataError(f"{folder} has no labels of the run {run}: remove {run}.json to run it again.")
    return read_hypotheses(file, LABEL)
