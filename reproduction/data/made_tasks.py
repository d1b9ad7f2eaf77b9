"""Synthetic data of three tasks, from the grammars in this folder: classification, question answering, summarisation.

    python -m reproduction.data.made_tasks    write reproduction/data/made

Every sentence of the grammars belongs to train, dev or test, and so does every word of the slots. The output is
deterministic.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import tomllib
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from typing import Any

from pema.files import writing

GRAMMARS = Path(__file__).parent / "grammars"
DATA = Path(__file__).parent / "made"
PARTS = ("train", "dev", "test")
SIZES = {
    "classification": {"train": 396, "dev": 60, "test": 150},
    "qa": {"train": 500, "dev": 60, "test": 150},
    "summarisation": {"train": 400, "dev": 64, "test": 152},
}
SLOT = re.compile(r"\{([a-z]+[12]?)\}")
START = re.compile(r"(^|(?<=[.?!] ))[a-z]")
Words = Mapping[str, list[tuple[str, str]]]
Pair = tuple[str, str]
Maker = Callable[[], Pair]


def grammar(name: str) -> dict[str, Any]:
    """Read a grammar."""
    return tomllib.loads((GRAMMARS / f"{name}.toml").read_text(encoding="utf-8"))


class SlotWords:
    """Words for the slots of one example, drawn on first use: `object1` and `object2` differ."""

    def __init__(self, words: Words, draw: random.Random) -> None:
        self._words, self._draw = words, draw
        self._drawn: dict[str, Pair] = {}

    def __getitem__(self, slot: str) -> Pair:
        if slot not in self._drawn:
            free = [word for word in self._words[slot.rstrip("12")] if word not in self._drawn.values()]
            self._drawn[slot] = self._draw.choice(free)
        return self._drawn[slot]

    def english(self, template: str) -> str:
        """Return the sentence with filled slots, `an` before vowels, and a capital letter at the start."""
        text = re.sub(r"\b([Aa]) (?=[aeiou])", r"\1n ", SLOT.sub(lambda slot: self[slot[1]][0], template))
        return START.sub(lambda letter: letter[0].upper(), text)

    def german(self, template: str) -> str:
        """Return the German sentence, in which a slot is a subject."""
        return START.sub(lambda letter: letter[0].upper(), SLOT.sub(lambda slot: self[slot[1]][1], template))


def classification(part: str, words: Words, draw: random.Random) -> Iterator[Maker]:
    """Draw a message: the request, with an optional opening and an optional aside about another department."""
    grams = grammar("classification")
    labels, phrases, given = grams["labels"], grams["phrases"], grams[part]
    requests = {label: cycle(shuffled(given["requests"][label], draw)) for label in labels}

    def phrased(frames: list[str], label: str) -> str:
        return draw.choice(frames).replace("{phrase}", draw.choice(phrases[label]))

    def make(label: str) -> Pair:
        filling = SlotWords(words, draw)
        sentences = [next(requests[label]) if draw.random() < 0.5 else phrased(given["wishes"], label)]
        if draw.random() < 0.7:
            other = draw.choice([each for each in labels if each != label])
            aside = draw.choice(given["asides"][other]) if draw.random() < 0.5 else phrased(given["refusals"], other)
            sentences.insert(draw.randrange(2), aside)
        if draw.random() < 0.5:
            sentences.insert(0, draw.choice(given["openings"]))
        return " ".join(map(filling.english, sentences)), labels[label]

    return (partial(make, label) for label in cycle(labels))


def qa(part: str, words: Words, draw: random.Random) -> Iterator[Maker]:
    """Draw a context, a line break and a question, with the answer in German."""
    asked = [
        (each["context"], question, slot)
        for each in grammar("qa")[part]
        for question, slot in each["questions"].items()
    ]

    def make(context: str, question: str, slot: str) -> Pair:
        filling = SlotWords(words, draw)
        return f"{filling.english(context)}\n{filling.english(question)}", filling[slot][1]

    return (partial(make, *each) for each in cycle(shuffled(asked, draw)))


def summarisation(part: str, words: Words, draw: random.Random) -> Iterator[Maker]:
    """Draw a ticket: an opening, and the request among one or two asides; with the summary in German."""
    summaries, given = grammar("summarisation")["summaries"], grammar("summarisation")[part]
    requests = {kind: cycle(shuffled(given["requests"][kind], draw)) for kind in summaries}

    def make(kind: str) -> Pair:
        filling = SlotWords(words, draw)
        sentences = draw.sample(given["asides"], draw.choice((1, 2)))
        sentences.insert(draw.randrange(len(sentences) + 1), next(requests[kind]))
        ticket = [draw.choice(given["openings"]), *sentences]
        return " ".join(map(filling.english, ticket)), filling.german(summaries[kind])

    return (partial(make, kind) for kind in cycle(summaries))


TASKS: dict[str, Callable[[str, Words, random.Random], Iterator[Maker]]] = {
    "classification": classification,
    "qa": qa,
    "summarisation": summarisation,
}


def shuffled(values: list[Any], draw: random.Random) -> list[Any]:
    """Return the values in random order."""
    return draw.sample(values, len(values))


def draw_examples(task: str, part: str) -> list[Pair]:
    """Return the examples of one part in random order, without duplicate sources."""
    draw = random.Random(f"{task} {part}")
    words = {slot: [tuple(word) for word in some] for slot, some in grammar("words")[part].items()}
    pairs: dict[str, str] = {}
    for make in islice(TASKS[task](part, words, draw), SIZES[task][part]):
        source, target = make()
        while source in pairs:
            source, target = make()
        pairs[source] = target
    return shuffled(list(pairs.items()), draw)


def written(task: str, pairs: list[Pair]) -> str:
    """Return the file's text: TSV, or JSONL if sources have a line break."""
    if task == "qa":
        return "".join(json.dumps({"source": s, "target": t}, ensure_ascii=False) + "\n" for s, t in pairs)
    return "".join(f"{source}\t{target}\n" for source, target in pairs)


def data_name(task: str) -> str:
    """Return the name of a task's data in configs and results."""
    return f"made-{task}"


def file_of(task: str, part: str) -> Path:
    """Return the file of a part."""
    return DATA / task / f"{part}.{'jsonl' if task == 'qa' else 'tsv'}"


def main() -> None:
    """Write the files."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    for task in TASKS:
        for part in PARTS:
            with writing(file_of(task, part)) as temporary:
                temporary.write_text(written(task, draw_examples(task, part)), encoding="utf-8")


if __name__ == "__main__":
    main()
