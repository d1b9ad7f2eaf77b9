"""The data of a task: for training, for the choice of settings, and for the reported scores."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path

from pema.evaluation.formality import strip_marks
from pema.tasks.example import Example
from pema.tasks.labels import labels_of
from pema.tasks.readers import read_examples, read_lines

SUPPORT, RESTAURANTS = "support", "restaurants"
"""Names of the bundled data."""

DEMO_DATA = Path(str(resources.files("pema") / "demo_data"))
RESTAURANTS_FOLDER = DEMO_DATA / RESTAURANTS


@dataclass(frozen=True)
class Data:
    """The data of a task.

    Attributes:
        name: name of the data in results.
        task: name of the task.
        train: examples of the memory, one target each; `pema train` takes its held-out part from these.
        dev: examples for the choice of settings.
        test: examples for the reported scores.
        annotated: formal and informal references with [F]...[/F] marks for (dev, test), each None if there are none.
        labels: labels that `label_accuracy` chooses from, if the description gives them.
    """

    name: str
    task: str
    train: tuple[Example, ...]
    dev: tuple[Example, ...]
    test: tuple[Example, ...]
    annotated: Mapping[str, tuple[list[str], list[str]]] = field(default_factory=dict)
    labels: tuple[str, ...] | None = None

    @property
    def choices(self) -> tuple[str, ...]:
        """Labels to choose from: `labels`, or the different targets of `train`."""
        return labels_of(self.train) if self.labels is None else self.labels

    def digest(self) -> str:
        """Return the SHA-256 of all examples, by which a result identifies its data."""
        digest = hashlib.sha256()
        for part in (self.train, self.dev, self.test):
            for example in part:
                digest.update(json.dumps(example.to_list(), ensure_ascii=False).encode())
            digest.update(b"|")
        if self.labels is not None:
            digest.update(json.dumps(self.labels, ensure_ascii=False).encode())
        return digest.hexdigest()


def support_data() -> Data:
    """Read the bundled customer-support sentences (see `demo_data/README.md`)."""

    def fields(name: str) -> list[list[str]]:
        return [line.split("\t") for line in read_lines(DEMO_DATA / name)]

    test = fields("support_test.tsv")
    return Data(
        name="support",
        task="translation",
        train=tuple(Example(source, target) for source, target in fields("support_train.tsv")),
        dev=tuple(Example(source, target) for source, target in fields("support_dev.tsv")),
        test=tuple(Example(source, strip_marks(formal)) for source, formal, _ in test),
        annotated={"test": ([formal for _, formal, _ in test], [informal for _, _, informal in test])},
    )


def restaurant_data() -> Data:
    """Read descriptions of restaurants, a part of E2E NLG (see `demo_data/restaurants/README.md`)."""
    train, dev, test = (read_examples(data=RESTAURANTS_FOLDER / f"{part}.jsonl") for part in ("train", "dev", "test"))
    return Data(name=RESTAURANTS, task="data-to-text", train=tuple(train), dev=tuple(dev), test=tuple(test))


SHIPPED = {SUPPORT: support_data, RESTAURANTS: restaurant_data}
"""Readers of the bundled data, by name."""
