"""Data of three tasks, made from the grammars in `recipes/grammars`: classification, question answering, summarisation.

    python -m recipes.made_tasks    write configs/data/made

Every sentence of the grammars belongs to train, dev or test, and so does every word that fills them. The same grammars
give the same bytes.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import tomllib
from collections.abc import Callable, Iterator, Mapping
from itertools import cycle
from pathlib import Path
from typing import Any

from pema.files import writing

GRAMMARS = Path(__file__).parent / "grammars"
DATA = Path(__file__).parent.parent / "configs" / "data" / "made"
PARTS = ("train", "dev", "test")
SIZES = {
    "classification": {"train": 396, "dev": 60, "test": 150},
    "qa": {"train": 500, "dev": 60, "test": 150},
    "summarisation": {"train": 400, "dev": 64, "test": 152},
}
SLOT = re.compile(r"\{(([a-z]+)[12]?)\}")
Words = Mapping[str, list[tuple[str, str]]]
Pair = tuple[str, str]


def grammar(name: str) -> dict[str, Any]:
    return tomllib.loads((GRAMMARS / f"{name}.toml").read_text(encoding="utf-8"))


class Filling:
    """Words for the slots of one example, drawn when they are first asked for: `object1` and `object2` differ."""

    def __init__(self, words: Words, draw: random.Random) -> None:
        self._words, self._draw = words, draw
        self._drawn: dict[str, Pair] = {}

    def __getitem__(self, slot: str) -> Pair:
        if slot not in self._drawn:
            free = [word for word in self._words[slot.rstrip("12")] if word not in self._drawn.values()]
            self._drawn[slot] = self._draw.choice(free)
        return self._drawn[slot]

    def english(self, template: str) -> str:
        """The template with its slots filled, and `an` where a vowel follows."""
        return re.sub(r"\b([Aa]) (?=[aeiou])", r"\1n ", SLOT.sub(lambda slot: self[slot[1]][0], template))

    def german(self, slot: str, case: str = "noun") -> str:
        """The word alone, or as a direct object with its article."""
        word = self[slot][1]
        if not slot.startswith("object"):
            return word
        article, _, noun = word.partition(" ")
        return noun if case == "noun" else f"{'den' if article == 'der' else article} {noun}"


def classification(part: str, words: Words, draw: random.Random) -> Iterator[Pair]:
    """A message: perhaps an opening, the request, perhaps an aside about another department's matter."""
    grams = grammar("classification")
    given = grams[part]
    requests = {label: cycle(shuffled(given["requests"][label], draw)) for label in grams["labels"]}
    for label in cycle(grams["labels"]):
        filling = Filling(words, draw)
        others = [aside for other, asides in given["asides"].items() if other != label for aside in asides]
        sentences = [next(requests[label])]
        if draw.random() < 0.7:
            sentences.insert(draw.randrange(2), draw.choice(others))
        if draw.random() < 0.5:
            sentences.insert(0, draw.choice(given["openings"]))
        yield " ".join(filling.english(sentence) for sentence in sentences), grams["labels"][label]


def qa(part: str, words: Words, draw: random.Random) -> Iterator[Pair]:
    """A context, a line break and a question; the answer in German."""
    asked = [
        (each["context"], question, slot) for each in grammar("qa")[part] for question, slot in each["questions"].items()
    ]
    for context, question, slot in cycle(shuffled(asked, draw)):
        filling = Filling(words, draw)
        yield f"{filling.english(context)}\n{filling.english(question)}", filling.german(slot)


def summarisation(part: str, words: Words, draw: random.Random) -> Iterator[Pair]:
    """A ticket: an opening, then the request among one or two asides; the summary in German."""
    grams = grammar("summarisation")
    given = grams[part]
    requests = {kind: cycle(shuffled(given["requests"][kind], draw)) for kind in grams["summaries"]}
    for kind, summary in cycle(grams["summaries"].items()):
        filling = Filling(words, draw)
        sentences = draw.sample(given["asides"], draw.choice((1, 2)))
        sentences.insert(draw.randrange(len(sentences) + 1), next(requests[kind]))
        ticket = [draw.choice(given["openings"]), *sentences]
        text = summary.replace("{object1}", filling.german("object1", "accusative"))
        yield " ".join(filling.english(sentence) for sentence in ticket), text


TASKS: dict[str, Callable[[str, Words, random.Random], Iterator[Pair]]] = {
    "classification": classification,
    "qa": qa,
    "summarisation": summarisation,
}


def shuffled(values: list[Any], draw: random.Random) -> list[Any]:
    return draw.sample(values, len(values))


def made(task: str, part: str) -> list[Pair]:
    """The examples of one part, no source twice, in random order."""
    draw = random.Random(f"{task} {part}")
    words = {slot: [tuple(word) for word in some] for slot, some in grammar("words")[part].items()}
    pairs: dict[str, str] = {}
    for source, target in TASKS[task](part, words, draw):
        pairs.setdefault(source, target)
        if len(pairs) == SIZES[task][part]:
            return shuffled(list(pairs.items()), draw)
    raise AssertionError("a grammar never ends")


def written(task: str, pairs: list[Pair]) -> str:
    """The file's text: TSV, or JSONL where sources have a line break."""
    if task == "qa":
        return "".join(json.dumps({"source": s, "target": t}, ensure_ascii=False) + "\n" for s, t in pairs)
    return "".join(f"{source}\t{target}\n" for source, target in pairs)


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    for task in TASKS:
        for part in PARTS:
            with writing(DATA / task / f"{part}.{'jsonl' if task == 'qa' else 'tsv'}") as temporary:
                temporary.write_text(written(task, made(task, part)), encoding="utf-8")


if __name__ == "__main__":
    main()
