"""The report as a file, in the format of its suffix."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from pema.errors import ConfigError
from pema.experiments.reader import read_results
from pema.experiments.records import Results
from pema.experiments.writers import comma_separated, latex, markdown
from pema.files import writing
from pema.pages.report.document import page

WRITERS: dict[str, Callable[[Sequence[Results]], str]] = {
    ".html": page,
    ".md": markdown,
    ".tex": latex,
    ".csv": comma_separated,
}
"""Writers by suffix: the page with everything, or only the tables."""


def writer_of(output: Path) -> Callable[[Sequence[Results]], str]:
    """Return the writer for the suffix of a file.

    Raises:
        ConfigError: the suffix is unknown.
    """
    write = WRITERS.get(output.suffix)
    if write is None:
        *others, last = WRITERS
        raise ConfigError(f"unknown suffix {output.suffix!r} of {output}: use {', '.join(others)} or {last}.")
    return write


def write_report(results: Path, output: Path) -> list[Results]:
    """Write the report of one experiment's folder, or of a folder of several.

    Args:
        results: the folder.
        output: the file; see `WRITERS` for its suffixes.

    Returns:
        The experiments of the report.

    Raises:
        ConfigError: the suffix is unknown.
        DataError: see `read_results`.
        StorageError: the file cannot be written.
    """
    write = writer_of(output)
    experiments = read_results(results)
    with writing(output) as temporary:
        temporary.write_text(write(experiments), encoding="utf-8", newline="\n")
    return experiments
