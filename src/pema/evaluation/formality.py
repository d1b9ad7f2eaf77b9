"""Formality accuracy: M-ACC, matched accuracy, of CoCoA-MT (Nadejde et al. 2022).

Phrases that mark formality are enclosed in [F]...[/F] in a formal and an informal reference. A hypothesis is formal if
it matches at least one phrase of the formal reference and none of the informal one, informal in the opposite case, and
ignored if it matches neither or both. M-ACC = formal / (formal + informal).

Three ways of matching a phrase, all case-sensitive:

- `tokens`, as in the official scorer: each token of the phrase is a token of the hypothesis, in any order, with tokens
  split at spaces. `du` is not in `durch`; but `Ihnen` is not in `mit Ihnen.` either.
- `words`: the exact phrase, not adjacent to a letter, digit or mark. `Ihnen` is in `mit Ihnen.`.
- `substring`, as in the official scorer for languages without spaces: the exact phrase, anywhere.

The default is `substring` if most letters of the references belong to a script without spaces, and `tokens` otherwise.

Composed and decomposed letters are equal: both sides are compared in NFC.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np

from pema.errors import DataError
from pema.evaluation.score import Array, Reference, require_aligned
from pema.schema import among
from pema.tasks.characters import are_unspaced

Matching = Literal["tokens", "words", "substring"]
Formality = Literal["formal", "informal", "neither", "both"]

MARKED = re.compile(r"\[F\](.*?)\[/F\]")
MARK = re.compile(r"\[/?F\]")


class FormalityAccuracy:
    """M-ACC of hypotheses against annotated references, 0 to 1; 0 where none match, as in the official scorer."""

    LABELS: tuple[Formality, ...] = ("formal", "informal", "neither", "both")

    def __init__(self, formal: Sequence[str], informal: Sequence[str], *, matching: Matching | None = None) -> None:
        """Read the annotated references.

        Raises:
            ConfigError: the way of matching is unknown.
            DataError: the references are not aligned, their marks are unbalanced, or there are no marks at all.
        """
        if matching is None:
            matching = "substring" if are_unspaced(map(strip_marks, (*formal, *informal))) else "tokens"
        among("matching", [matching], _MATCHING)
        require_aligned(formal=formal, informal=informal)
        self.formal = [phrases(text, f"formal reference {i}") for i, text in enumerate(formal, start=1)]
        self.informal = [phrases(text, f"informal reference {i}") for i, text in enumerate(informal, start=1)]
        for name, marked in (("formal", self.formal), ("informal", self.informal)):
            if not any(marked):
                raise DataError(f"no phrase is marked [F]...[/F] in the {name} references: give the annotated files.")
        self.matching: Matching = matching

    def labels(self, hypotheses: Sequence[str]) -> list[Formality]:
        """Return the label of each hypothesis."""
        require_aligned(hypotheses=hypotheses, annotated_references=[""] * len(self.formal))
        matches = _MATCHING[self.matching]
        labels: list[Formality] = []
        for text, formal, informal in zip(hypotheses, self.formal, self.informal, strict=True):
            hypothesis = unicodedata.normalize("NFC", text)
            is_formal = any(matches(phrase, hypothesis) for phrase in formal)
            is_informal = any(matches(phrase, hypothesis) for phrase in informal)
            if is_formal == is_informal:
                labels.append("both" if is_formal else "neither")
            else:
                labels.append("formal" if is_formal else "informal")
        return labels

    def statistics(self, hypotheses: Sequence[str], references: Sequence[Reference]) -> Array:
        """Return the one-hot label of each hypothesis, (n, 4); the plain references are not read."""
        labels = self.labels(hypotheses)
        return np.array([[label == each for each in self.LABELS] for label in labels], np.float64)

    def value(self, totals: Array) -> float:
        """Return formal / (formal + informal)."""
        matched = totals[0] + totals[1]
        return float(totals[0] / matched) if matched else 0.0

    def texts(self, totals: Array) -> int:
        """Return formal + informal."""
        return int(totals[0] + totals[1])

    def signature(self, totals: Array) -> str:
        """Return the way of matching and the number of hypotheses per label."""
        counts = "|".join(f"{label}:{int(count)}" for label, count in zip(self.LABELS, totals, strict=True))
        return f"M-ACC|matching:{self.matching}|case:mixed|{counts}"


def phrases(text: str, where: str = "reference") -> list[str]:
    """Return the marked phrases of an annotated reference, in NFC.

    Raises:
        DataError: the marks are unbalanced, or a phrase is blank; the message starts with `where`.
    """
    marks = MARK.findall(text)
    if marks != ["[F]", "[/F]"] * (len(marks) // 2):
        raise DataError(f"{where}: the marks [F] and [/F] are not balanced in {text!r}: fix the reference.")
    marked = [phrase.strip() for phrase in MARKED.findall(unicodedata.normalize("NFC", text))]
    if len(marked) != len(marks) // 2 or not all(marked):
        raise DataError(f"{where}: a marked phrase is blank in {text!r}: fix the reference.")
    return marked


def strip_marks(text: str) -> str:
    """Remove the marks from an annotated reference."""
    return MARK.sub("", text)


def _as_tokens(phrase: str, hypothesis: str) -> bool:
    return set(phrase.split()) <= set(hypothesis.split())


def _as_words(phrase: str, hypothesis: str) -> bool:
    starts = (match.start() for match in re.finditer(f"(?={re.escape(phrase)})", hypothesis))
    neighbours = ((hypothesis[:start][-1:], hypothesis[start + len(phrase) :][:1]) for start in starts)
    return any(not _of_a_word(before) and not _of_a_word(after) for before, after in neighbours)


def _of_a_word(character: str) -> bool:
    """Return whether `character` is a letter, a digit or a combining mark; False for an empty string."""
    return character.isalnum() or character == "_" or (bool(character) and unicodedata.category(character)[0] == "M")


def _as_substring(phrase: str, hypothesis: str) -> bool:
    return phrase in hypothesis


_MATCHING: dict[Matching, Callable[[str, str], bool]] = {
    "tokens": _as_tokens,
    "words": _as_words,
    "substring": _as_substring,
}
