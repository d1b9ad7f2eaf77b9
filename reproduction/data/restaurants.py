"""The restaurants of the demo: the bundled part of E2E NLG.

    python -m reproduction.data.restaurants DATA

DATA contains the folder `e2e-nlg`. 47 records of its development set are dev data, the others train, each with one of
its texts. 100 records of its test set are kept, with all references.
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
from pathlib import Path
from typing import Any

from pema.experiments.data import RESTAURANTS_FOLDER
from pema.files import writing

DEV, TEST = 47, 100


def published(file: Path) -> list[dict[str, Any]]:
    """Return the records of a part of E2E NLG, each with a source and several targets, as published."""
    with gzip.open(file, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def records(file: Path) -> list[dict[str, Any]]:
    """Return the records of a part of E2E NLG in an order that is drawn once for all."""
    rows = published(file)
    random.Random(0).shuffle(rows)
    return rows


def parts(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """Return train, dev and test."""
    development, test = records(folder / "dev.jsonl.gz"), records(folder / "test.jsonl.gz")
    draw = random.Random(1)
    pairs = [{"source": row["source"], "target": draw.choice(row["targets"])} for row in development]
    return {"train": pairs[DEV:], "dev": pairs[:DEV], "test": test[:TEST]}


def main() -> None:
    """Write the files of the package."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("data", type=Path, help="folder with e2e-nlg")
    for name, rows in parts(parser.parse_args().data / "e2e-nlg").items():
        with writing(RESTAURANTS_FOLDER / f"{name}.jsonl") as partial:
            lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
            partial.write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
