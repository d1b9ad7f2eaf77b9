"""The interface of metrics, and scores that always carry their signature."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from pema.errors import DataError
from pema.schema import require_texts, short

Array = npt.NDArray[np.float64]
Reference = str | Sequence[str]
"""The reference of a segment, or all its valid references."""


@dataclass(frozen=True)
class Score:
    """Value of a metric.

    Attributes:
        value: the value on the scale of the metric's official scorer: 0 to 100 for BLEU, chrF, ROUGE, exact match and
            F1, 0 to 1 for the accuracies.
        signature: what was computed and how, so that the number can be reproduced.
        texts: number of texts that the value is computed from, if the metric ignores some; else None.
    """

    value: float
    signature: str
    texts: int | None = None


class Metric(Protocol):
    """Corpus metric as a function of summed statistics, so that resamples of a corpus are cheap to score."""

    def statistics(self, hypotheses: Sequence[str], references: Sequence[Reference]) -> Array:
        """Return the statistics of each segment, (n, k)."""

    def value(self, totals: Array) -> float:
        """Return the metric of a corpus whose statistics sum to `totals`, (k,)."""

    def signature(self, totals: Array) -> str:
        """Return what the metric computes and how."""


@runtime_checkable
class Selective(Metric, Protocol):
    """Metric that may ignore texts, so that its value can rest on few of them."""

    def texts(self, totals: Array) -> int:
        """Return the number of texts that the value is computed from."""


def texts_of(metric: Metric, totals: Array, count: int) -> int | None:
    """Return the number of texts that a value is computed from; None if these are all `count`."""
    texts = metric.texts(totals) if isinstance(metric, Selective) else count
    return None if texts == count else texts


def all_valid(references: Sequence[Reference]) -> list[tuple[str, ...]]:
    """Return the references of each segment.

    Raises:
        DataError: a segment has none; the message gives its number, counted from 1.
    """
    several = [(each,) if isinstance(each, str) else tuple(each) for each in references]
    for number, texts in enumerate(several, start=1):
        if not texts:
            raise DataError(f"segment {number} has no reference: give at least one.")
    return several


def references_part(segments: float, references: float) -> str:
    """Return the part of a signature that gives the number of references; empty if each segment has one."""
    return "" if references == segments else f"|refs:{int(references)}"


def score(metric: Metric, hypotheses: Sequence[str], references: Sequence[Reference]) -> Score:
    """Score a corpus.

    Raises:
        DataError: there is nothing to score, or hypotheses and references are not aligned.
    """
    require_aligned(hypotheses=hypotheses, references=references)
    totals = metric.statistics(hypotheses, references).sum(0)
    return Score(metric.value(totals), metric.signature(totals), texts_of(metric, totals, len(hypotheses)))


def require_aligned(**texts: Sequence[Reference]) -> None:
    """Check that lists have equal lengths and are not empty.

    Raises:
        ConfigError: one of them is a text, whose characters would each be scored.
        DataError: they do not; the message gives the names and lengths of the lists. Or an item is not a text, nor
            several.
    """
    for name, lines in texts.items():
        require_texts(name, lines)
        for number, line in enumerate(lines, start=1):
            several = line if isinstance(line, list | tuple) else (line,)
            if not all(isinstance(each, str) for each in several):
                raise DataError(f"{name}, number {number}: {short(line)} is not a text. Give one text for each source.")
    lengths = {name: len(lines) for name, lines in texts.items()}
    if len(set(lengths.values())) > 1:
        counts = ", ".join(f"{length} {name}" for name, length in lengths.items())
        raise DataError(f"not aligned: {counts}. Give one of each per line, in the same order.")
    if not all(lengths.values()):
        raise DataError(f"nothing to score: there are no {' and no '.join(lengths)}.")
