"""Label accuracy."""

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
    """Remove enclosing quotation marks and final sentence punctuation; keep a label of punctuation only."""
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
    """Fraction of hypotheses that equal the reference label, 0 to 1.

    Labels are compared in composed letters (NFC) of usual width, with single spaces. Case, enclosing quotation marks
    and final sentence punctuation are ignored, unless they distinguish two of the reference labels; signs and other
    symbols always count.
    """

    def statistics(self, hypotheses: Sequence[str], references: Sequence[str]) -> Array:
        """Return (n, 4): whether each is correct, 1, and whether each of `NORMALISATIONS` was applied."""
        predicted, gold = [_spaced(text) for text in hypotheses], [_spaced(text) for text in references]
        applied = []
        for _, normalise in NORMALISATIONS:
            labels = set(gold)
            harmless = len({normalise(label) for label in labels}) == len(labels)
            if harmless:
                predicted, gold = [normalise(text) for text in predicted], [normalise(text) for text in gold]
            applied.append(float(harmless))
        return np.array([(a == b, 1.0, *applied) for a, b in zip(predicted, gold, strict=True)], np.float64)

    def value(self, totals: Array) -> float:
        """Return the mean over the segments."""
        return float(totals[0] / totals[1])

    def signature(self, totals: Array) -> str:
        """Return the applied normalisations and the number of segments."""
        applied = [name for (name, _), count in zip(NORMALISATIONS, totals[2:], strict=True) if count]
        return f"accuracy|norm:{','.join(['nfc', 'width', *applied])}|n:{int(totals[1])}|scale:1"


def accuracy() -> Accuracy:
    """Build the metric: fraction of hypotheses that equal the reference label, 0 to 1."""
    return Accuracy()


def _spaced(text: str) -> str:
    return " ".join(canonical(text).split())
