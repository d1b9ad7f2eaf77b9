"""Accuracy of labels."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

import numpy as np

from pema.evaluation.characters import canonical
from pema.evaluation.score import Array

QUOTE = "[\"'`´‘’‚‛“”„‟«»‹›「」『』]"
QUOTED = re.compile(rf"{QUOTE}\s*(.+?)\s*{QUOTE}")
END = re.compile(r"[\s.,;:!?…。、।]+$")


def trimmed(label: str) -> str:
    """A label without quotation marks around it and sentence punctuation behind it; punctuation alone is kept."""
    bare = END.sub("", label) or label
    quoted = QUOTED.fullmatch(bare)
    if quoted:
        bare = quoted[1]
    return label if bare == label else trimmed(bare)


NORMALISATIONS: tuple[tuple[str, Callable[[str], str]], ...] = (
    ("casefold", lambda label: canonical(label.casefold())),
    ("ends", trimmed),
)


class Accuracy:
    """The share of hypotheses that are the reference label, 0 to 1.

    Labels are compared in composed letters (NFC) of usual width, with single spaces. Case, quotation marks around a
    label and sentence punctuation behind it do not count, unless they tell two of the reference labels apart; signs and
    other symbols always count.
    """

    def statistics(self, hypotheses: Sequence[str], references: Sequence[str]) -> Array:
        """Whether each is right, 1, and whether each of `NORMALISATIONS` was made: (n, 4)."""
        said, gold = [_spaced(text) for text in hypotheses], [_spaced(text) for text in references]
        made = []
        for _, normalise in NORMALISATIONS:
            labels = set(gold)
            harmless = len({normalise(label) for label in labels}) == len(labels)
            if harmless:
                said, gold = [normalise(text) for text in said], [normalise(text) for text in gold]
            made.append(float(harmless))
        return np.array([(a == b, 1.0, *made) for a, b in zip(said, gold, strict=True)], np.float64)

    def value(self, totals: Array) -> float:
        """The mean over the segments."""
        return float(totals[0] / totals[1])

    def signature(self, totals: Array) -> str:
        """The normalisations that were made, and how many segments there are."""
        made = [name for (name, _), count in zip(NORMALISATIONS, totals[2:], strict=True) if count]
        return f"accuracy|norm:{','.join(['nfc', 'width', *made])}|n:{int(totals[1])}|scale:1"


def accuracy() -> Accuracy:
    """Share of hypotheses that are the reference label, 0 to 1."""
    return Accuracy()


def _spaced(text: str) -> str:
    return " ".join(canonical(text).split())
