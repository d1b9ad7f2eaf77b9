"""Sources of `pema generate` and `pema classify`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pema.errors import ConfigError

if TYPE_CHECKING:
    from pema.tasks.example import Example


def read_inputs(inputs: Path | None, data: str | None, source_field: str | None) -> Sequence[str | Example]:
    """Read the sources from one of the two options.

    Raises:
        ConfigError: neither or both are given, or `--input` names a file that is not one text per line.
    """
    from pema.evaluation.outputs import is_json_lines
    from pema.tasks.readers import read_lines, read_sources

    if (inputs is None) == (data is None):
        raise ConfigError("give the sources once: --input (a text file, one per line) or --data (JSONL, TSV, ...).")
    if inputs is not None:
        if is_json_lines(inputs):
            raise ConfigError(f"--input reads one text per line: give --data {inputs}.")
        return read_lines(inputs)
    return read_sources(data, source_field)
