"""The real data that the experiments use, as files.

    python -m reproduction.data.real DATA -o FOLDER

DATA holds the folders `cocoa-mt-en-de`, `multi30k-en-de`, `wmt22-en-de` and `e2e-nlg`. FOLDER gets a folder per data
set, with `train.jsonl`, `dev.jsonl`, `test.jsonl` and, where the references are annotated, `dev.formal.txt` and so on:
what `--data-root` of `pema compare` and `pema sweep` is given.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from pema.experiments.data import Data
from pema.files import writing
from pema.owner.local import LocalPLM
from pema.tasks.example import Example
from pema.tasks.readers import read_examples, read_lines
from reproduction.data.restaurants import DEV, records

LONGEST = 80  # tokens of a source or a target: the PLMs have windows of 256 and 512 and learned on short sentences


def cocoa(folder: Path) -> Data:
    """Formal German for chat and telephony: 342 examples to train, 58 as dev, the topical chat test set."""
    folder = folder / "cocoa-mt-en-de"

    def examples(part: str) -> list[Example]:
        return read_examples(source=folder / f"{part}.en", target=folder / f"{part}.formal.de")

    def annotated(part: str) -> list[tuple[str, str]]:
        formal, informal = (
            read_lines(folder / f"{part}.{register}.annotated.de") for register in ("formal", "informal")
        )
        return list(zip(formal, informal, strict=True))

    parts = ("train.telephony", "train.topical_chat")
    both = [pair for part in parts for pair in zip(examples(part), annotated(part), strict=True)]
    dev = both[30:200:6] + both[230:400:6]
    train = [pair for pair in both if pair not in dev]
    marks = {"dev": [m for _, m in dev], "test": annotated("test.topical_chat")}
    return Data(
        name="cocoa-mt-formal",
        task="translation",
        train=tuple(e for e, _ in train),
        dev=tuple(e for e, _ in dev),
        test=tuple(examples("test.topical_chat")),
        annotated={part: ([f for f, _ in some], [i for _, i in some]) for part, some in marks.items()},
    )


def multi30k(folder: Path, examples: int | None = 1000) -> Data:
    """Image captions: the first examples (None: all), 200 of val as dev, the first 300 of the 2016 test set."""
    folder = folder / "multi30k-en-de"

    def part(name: str, limit: int | None = None) -> tuple[Example, ...]:
        return tuple(read_examples(source=folder / f"{name}.en.gz", target=folder / f"{name}.de.gz", limit=limit))

    name = "multi30k" if examples in (1000, None) else f"multi30k-{examples}"
    return Data(name, "translation", part("train", examples), part("val", 200), part("test_2016_flickr", 300))


def wmt22(folder: Path, tokenizer: PreTrainedTokenizerBase) -> Data:
    """News: the first 500 examples, 100 as dev and 200 as test, of those with short sources and targets."""
    folder = folder / "wmt22-en-de"

    def part(name: str, limit: int) -> tuple[Example, ...]:
        every = read_examples(data=str(folder / f"{name}.jsonl.gz"), source_field="en", target_field="du")
        sources = tokenizer([e.source for e in every])["input_ids"]
        targets = tokenizer([e.target for e in every])["input_ids"]
        sides = zip(every, sources, targets, strict=True)
        return tuple(e for e, s, t in sides if max(len(s), len(t)) <= LONGEST)[:limit]

    return Data("wmt22", "translation", part("train", 500), part("dev", 100), part("test", 200))


def e2e(folder: Path) -> Data:
    """Return E2E NLG: 500 records with all texts to train, 47 records with one text as dev, the official test set."""
    folder = folder / "e2e-nlg"
    development, test = (
        tuple(Example(row["source"], row["targets"][0], alternatives=tuple(row["targets"][1:])) for row in rows)
        for rows in (records(folder / "dev.jsonl.gz"), records(folder / "test.jsonl.gz"))
    )
    dev = tuple(Example(each.source, each.target) for each in development[:DEV])
    return Data("e2e-nlg", "data-to-text", development[DEV:], dev, test)


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
    # The embedded PLM's tokens decide what is short, whichever PLM the experiments adapt.
    tokenizer = LocalPLM.load("embedded").tokenizer
    for data in (cocoa(args.data), multi30k(args.data, None), wmt22(args.data, tokenizer), e2e(args.data)):
        write(data, args.output)
        sizes = ", ".join(f"{len(getattr(data, part))} {part}" for part in ("train", "dev", "test"))
        print(f"{args.output / data.name}: {sizes}")


if __name__ == "__main__":
    main()
