"""The real data that the experiments use, as files.

    python -m reproduction.data.real DATA -o FOLDER

DATA holds the folders `cocoa-mt-en-de`, `multi30k-en-de`, `e2e-nlg`, `webnlg-2017`, `nl2bash`, `clinc150` and `asset`.
FOLDER gets a folder per data set, with `train.jsonl`, `dev.jsonl`, `test.jsonl` and, where references are annotated,
`dev.formal.txt` and so on: what `--data-root` of `pema compare` and `pema sweep` is given.

Comparisons on a CPU train on 1,000 examples: which ones is drawn once, with `reproduction.data.restaurants.records`.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pema.experiments.data import Data
from pema.files import writing
from pema.tasks.example import Example
from pema.tasks.readers import read_examples, read_lines
from reproduction.data.restaurants import DEV, records

TRAIN, FEW = 1000, 50
"""Number of training examples on a CPU; number of dev examples, which every candidate writes a text for."""


def cocoa(folder: Path, register: str = "formal") -> Data:
    """German for chat and telephony in one register: 342 examples to train, 58 as dev, the topical chat test set."""
    folder = folder / "cocoa-mt-en-de"
    registers = ("formal", "informal") if register == "formal" else ("informal", "formal")

    def examples(part: str) -> list[Example]:
        return read_examples(source=folder / f"{part}.en", target=folder / f"{part}.{register}.de")

    def annotated(part: str) -> list[tuple[str, str]]:
        wanted, other = (read_lines(folder / f"{part}.{each}.annotated.de") for each in registers)
        return list(zip(wanted, other, strict=True))

    parts = ("train.telephony", "train.topical_chat")
    both = [pair for part in parts for pair in zip(examples(part), annotated(part), strict=True)]
    dev = both[30:200:6] + both[230:400:6]
    train = [pair for pair in both if pair not in dev]
    marks = {"dev": [m for _, m in dev], "test": annotated("test.topical_chat")}
    return Data(
        name=f"cocoa-mt-{register}",
        task="translation",
        train=tuple(e for e, _ in train),
        dev=tuple(e for e, _ in dev),
        test=tuple(examples("test.topical_chat")),
        annotated={part: ([w for w, _ in some], [o for _, o in some]) for part, some in marks.items()},
    )


def multi30k(folder: Path) -> Data:
    """Image captions: the first 1,000 examples, 50 of val as dev, the first 200 of the 2016 test set."""
    folder = folder / "multi30k-en-de"

    def part(name: str, limit: int) -> tuple[Example, ...]:
        return tuple(read_examples(source=folder / f"{name}.en.gz", target=folder / f"{name}.de.gz", limit=limit))

    return Data("multi30k", "translation", part("train", TRAIN), part("val", FEW), part("test_2016_flickr", 200))


def e2e(folder: Path, texts: int | None = None) -> Data:
    """Return E2E NLG: 500 records to train, 47 records with one text as dev, the official test set.

    Args:
        folder: folder of the data sets.
        texts: number of texts per training record; None: all, and all 630 test records, otherwise 210 of them.
    """
    folder = folder / "e2e-nlg"
    development, test = (_several(records(folder / f"{part}.jsonl.gz")) for part in ("dev", "test"))
    dev = tuple(Example(each.source, each.target) for each in development[:DEV])
    train = tuple(
        Example(each.source, each.target, alternatives=each.alternatives[: None if texts is None else texts - 1])
        for each in development[DEV:]
    )
    if texts is None:
        return Data("e2e-nlg", "data-to-text", train, dev, test)
    return Data(f"e2e-nlg-{texts}-texts", "data-to-text", train, dev, test[:210])


def webnlg(folder: Path, seen: bool) -> Data:
    """Return WebNLG 2017: 1,000 triple sets with one text to train, 50 as dev, 100 test inputs with all references.

    Args:
        folder: folder of the data sets.
        seen: whether the test inputs are of categories of the training set, or of others.
    """
    folder = folder / "webnlg-2017"
    train, dev = (_one(records(folder / f"{part}.jsonl.gz")) for part in ("train", "dev"))
    test = _several([row for row in records(folder / "test.jsonl.gz") if row["seen"] == seen])
    return Data(f"webnlg-{'seen' if seen else 'unseen'}", "data-to-text", train[:TRAIN], dev[:FEW], test[:100])


def nl2bash(folder: Path) -> Data:
    """Return NL2Bash: 1,000 examples to train, 50 as dev, 200 test examples."""
    train, dev, test = (_pairs(records(folder / "nl2bash" / f"{part}.jsonl.gz")) for part in ("train", "dev", "test"))
    return Data("nl2bash", "reply", train[:TRAIN], dev[:FEW], test[:200])


def clinc(folder: Path) -> Data:
    """Return CLINC150: seven messages of each of 150 intents to train, one as dev, three as test."""

    def part(name: str, per_intent: int) -> tuple[Example, ...]:
        by_intent: dict[str, list[Example]] = defaultdict(list)
        for each in _pairs(records(folder / "clinc150" / f"{name}.jsonl.gz")):
            by_intent[each.target].append(each)
        return tuple(each for intent in sorted(by_intent) for each in by_intent[intent][:per_intent])

    return Data("clinc150", "classification", part("train", 7), part("dev", 1), part("test", 3))


def asset(folder: Path) -> Data:
    """Return ASSET: 1,000 sentences with one of ten simpler texts to train, 50 as dev, 200 test sentences with all."""
    train, test = (records(folder / "asset" / f"{part}.jsonl.gz") for part in ("train", "test"))
    one = [Example(row["source"], row["targets"][i % len(row["targets"])]) for i, row in enumerate(train)]
    return Data("asset", "summarisation", tuple(one[FEW : FEW + TRAIN]), tuple(one[:FEW]), _several(test)[:200])


def _one(rows: Sequence[Mapping[str, Any]]) -> tuple[Example, ...]:
    return tuple(Example(row["source"], row["targets"][0]) for row in rows)


def _several(rows: Sequence[Mapping[str, Any]]) -> tuple[Example, ...]:
    return tuple(Example(row["source"], row["targets"][0], alternatives=tuple(row["targets"][1:])) for row in rows)


def _pairs(rows: Sequence[Mapping[str, Any]]) -> tuple[Example, ...]:
    return tuple(Example(row["source"], row["target"]) for row in rows)


def every(folder: Path) -> list[Data]:
    """Return all data sets."""
    return [
        *(cocoa(folder, register) for register in ("formal", "informal")),
        multi30k(folder),
        *(e2e(folder, texts) for texts in (None, 2)),
        *(webnlg(folder, seen) for seen in (True, False)),
        nl2bash(folder),
        clinc(folder),
        asset(folder),
    ]


def write(data: Data, folder: Path) -> None:
    """Write a data set to `folder / data.name`, which is whole afterwards, or as it was."""
    with writing(folder / data.name) as temporary:
        temporary.mkdir()
        for part in ("train", "dev", "test"):
            several = any(each.alternatives for each in getattr(data, part))
            examples = (
                {"source": each.source} | ({"targets": each.references} if several else {"target": each.target})
                for each in getattr(data, part)
            )
            _write_lines(temporary / f"{part}.jsonl", (json.dumps(each, ensure_ascii=False) for each in examples))
            for register, lines in zip(("formal", "informal"), data.annotated.get(part, ()), strict=False):
                _write_lines(temporary / f"{part}.{register}.txt", lines)


def _write_lines(path: Path, lines: Iterable[str]) -> None:
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8", newline="\n")


def main() -> None:
    """Write the files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("-o", "--output", type=Path, required=True)
    args = parser.parse_args()
    for data in every(args.data):
        write(data, args.output)
        sizes = ", ".join(f"{len(getattr(data, part))} {part}" for part in ("train", "dev", "test"))
        print(f"{args.output / data.name}: {sizes}")


if __name__ == "__main__":
    main()
