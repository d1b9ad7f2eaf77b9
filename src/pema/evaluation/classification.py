"""Label accuracy."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

import numpy as np

from pema.evaluation.score import Array, Reference, all_valid, references_part
from pema.tasks.characters import canonical

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
    """Fraction of hypotheses that equal the reference label, or one of several, 0 to 1.

    Labels are compared in composed letters (NFC) of usual width, with single spaces. Case, enclosing quotation marks
    and final sentence punctuation are ignored, unless they distinguish two of the reference labels; signs and other
    symbols always count.
    """

    def statistics(self, hypotheses: Sequence[str], references: Sequence[Reference]) -> Array:
        """Return (n, 5): correct or not, 1, whether each of `NORMALISATIONS` was applied, number of references."""
        predicted = [_spaced(text) for text in hypotheses]
        gold = [tuple(map(_spaced, texts)) for texts in all_valid(references)]
        applied = []
        for _, normalise in NORMALISATIONS:
            labels = {label for texts in gold for label in texts}
            harmless = len({normalise(label) for label in labels}) == len(labels)
            if harmless:
                predicted = [normalise(text) for text in predicted]
                gold = [tuple(map(normalise, texts)) for texts in gold]
            applied.append(float(harmless))
        pairs = zip(predicted, gold, strict=True)
        return np.array([(text in texts, 1.0, *applied, len(texts)) for text, texts in pairs], np.float64)

    def value(self, totals: Array) -> float:
        """Return the mean over the segments."""
        return float(totals[0] / totals[1])

    def signature(self, totals: Array) -> str:
        """Return the applied normalisations, the number of segments, and that of references if there are more."""
        applied = [name for (name, _), count in zip(NORMALISATIONS, totals[2:-1], strict=True) if count]
        refs = references_part(totals[1], totals[-1])
        return f"accuracy|norm:{','.join(['nfc', 'width', *applied])}|n:{int(totals[1])}{refs}|scale:1"


class LabelAccuracy(Accuracy):
    """`Accuracy` of labels that were chosen by their likelihood from a list of labels."""

    def signature(self, totals: Array) -> str:
        """Return the signature of `Accuracy`, with how the labels were chosen."""
        return super().signature(totals).replace("accuracy|", "label_accuracy|choice:likelihood|", 1)


def accuracy() -> Accuracy:
    """Build the metric: fraction of hypotheses that equal the reference label, 0 to 1."""
    return Accuracy()


def label_accuracy() -> LabelAccuracy:
    """Build the metric: `accuracy` of labels chosen by likelihood."""
    return LabelAccuracy()


def _spaced(text: str) -> str:
    return " ".join(canonical(text).split())
