"""Examples on the disk, in JSON Lines, as `readers.read_examples` reads them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from pema.files import writing
from pema.tasks.example import Example


def write_examples(path: Path, examples: Sequence[Example]) -> None:
    """Write examples in UTF-8, one JSON object per line, atomically.

    A source without a target has none in its row. If one example has several targets, all have a list.

    Raises:
        StorageError: writing failed; an existing file is unchanged.
    """
    several = any(example.alternatives for example in examples)
    with writing(path) as temporary, temporary.open("w", encoding="utf-8", newline="\n") as file:
        for example in examples:
            row = example.to_row(several=several)
            if not example.target:
                del row["targets" if several else "target"]
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
