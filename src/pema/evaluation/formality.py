"""Formality accuracy: M-ACC, matched accuracy, of CoCoA-MT (Nadejde et al. 2022).

Phrases that mark formality stand in [F]...[/F] in a formal and an informal reference. A hypothesis is formal when it
matches at least one phrase of the formal reference and none of the informal one, informal the other way round, and left
out when it matches neither or both. M-ACC = formal / (formal + informal).

How a phrase matches, case-sensitive always:

- `tokens`, as the official scorer does: every token of the phrase is a token of the hypothesis, in any order,
  tokens being split at spaces. `du` is not in `durch`; but `Ihnen` is not in `mit Ihnen.` either.
- `words`: the phrase as it stands, with no letter, digit or mark touching its ends. `Ihnen` is in `mit Ihnen.`.
- `substring`, the official scorer's way for languages without spaces: the phrase as it stands, anywhere.

Where none is named, it is `substring` if most letters of the references belong to a script without spaces, and `tokens`
otherwise.

Composed and decomposed letters are the same: both sides are compared in NFC.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np

from pema.errors import ConfigError, DataError
from pema.evaluation.characters import are_unspaced
from pema.evaluation.score import Array, require_aligned

Matching = Literal["tokens", "words", "substring"]
Formality = Literal["formal", "informal", "neither", "both"]

MARKED = re.compile(r"\[F\](.*?)\[/F\]")
MARK = re.compile(r"\[/?F\]")


class FormalityAccuracy:
    """M-ACC of hypotheses against annotated references, 0 to 1; as in the official scorer, 0 where none match."""

    LABELS: tuple[Formality, ...] = ("formal", "informal", "neither", "both")

    def __init__(self, formal: Sequence[str], informal: Sequence[str], *, matching: Matching | None = None) -> None:
        """Read the annotated references.

        Raises:
            ConfigError: an unknown way of matching.
            DataError: the references are not aligned, their marks are not balanced, or there are none at all.
        """
        if matching is None:
            matching = "substring" if are_unspaced(map(strip_marks, (*formal, *informal))) else "tokens"
        if matching not in _MATCHING:
            raise ConfigError(f"matching {matching!r} is unknown: choose one of {', '.join(_MATCHING)}.")
        require_aligned(formal=formal, informal=informal)
        self.formal = [phrases(text, f"formal reference {i}") for i, text in enumerate(formal, start=1)]
        self.informal = [phrases(text, f"informal reference {i}") for i, text in enumerate(informal, start=1)]
        for name, marked in (("formal", self.formal), ("informal", self.informal)):
            if not any(marked):
                raise DataError(f"no phrase is marked [F]...[/F] in the {name} references: give the annotated files.")
        self.matching: Matching = matching

    def labels(self, hypotheses: Sequence[str]) -> list[Formality]:
        """What each hypothesis is."""
        require_aligned(hypotheses=hypotheses, annotated_references=[""] * len(self.formal))
        matches = _MATCHING[self.matching]
        found: list[Formality] = []
        for text, formal, informal in zip(hypotheses, self.formal, self.informal, strict=True):
            hypothesis = unicodedata.normalize("NFC", text)
            is_formal = any(matches(phrase, hypothesis) for phrase in formal)
            is_informal = any(matches(phrase, hypothesis) for phrase in informal)
            if is_formal == is_informal:
                found.append("both" if is_formal else "neither")
            else:
                found.append("formal" if is_formal else "informal")
        return found

    def statistics(self, hypotheses: Sequence[str], references: Sequence[str]) -> Array:
        """One-hot label of each hypothesis: (n, 4); the plain references are not read."""
        labels = self.labels(hypotheses)
        return np.array([[label == each for each in self.LABELS] for label in labels], np.float64)

    def value(self, totals: Array) -> float:
        """Formal / (formal + informal)."""
        matched = totals[0] + totals[1]
        return float(totals[0] / matched) if matched else 0.0

    def signature(self, totals: Array) -> str:
        """The way of matching, and how many hypotheses were what."""
        counts = "|".join(f"{label}:{int(count)}" for label, count in zip(self.LABELS, totals, strict=True))
        return f"M-ACC|matching:{self.matching}|case:mixed|{counts}"


def phrases(text: str, where: str = "reference") -> list[str]:
    """The marked phrases of an annotated reference, in NFC.

    Raises:
        DataError: the marks are not balanced, or a phrase is blank; the message begins with `where`.
    """
    marks = MARK.findall(text)
    if marks != ["[F]", "[/F]"] * (len(marks) // 2):
        raise DataError(f"{where}: the marks [F] and [/F] are not balanced in {text!r}.")
    found = [phrase.strip() for phrase in MARKED.findall(unicodedata.normalize("NFC", text))]
    if len(found) != len(marks) // 2 or not all(found):
        raise DataError(f"{where}: a marked phrase is blank in {text!r}.")
    return found


def strip_marks(text: str) -> str:
    """An annotated reference as plain text."""
    return MARK.sub("", text)


def _as_tokens(phrase: str, hypothesis: str) -> bool:
    return set(phrase.split()) <= set(hypothesis.split())


def _as_words(phrase: str, hypothesis: str) -> bool:
    starts = (found.start() for found in re.finditer(f"(?={re.escape(phrase)})", hypothesis))
    beside = ((hypothesis[:start][-1:], hypothesis[start + len(phrase) :][:1]) for start in starts)
    return any(not _of_a_word(before) and not _of_a_word(after) for before, after in beside)


def _of_a_word(character: str) -> bool:
    """Whether a character, if there is one, is a letter, a digit or a mark on one."""
    return character.isalnum() or character == "_" or (bool(character) and unicodedata.category(character)[0] == "M")


def _as_substring(phrase: str, hypothesis: str) -> bool:
    return phrase in hypothesis


_MATCHING: dict[Matching, Callable[[str, str], bool]] = {
    "tokens": _as_tokens,
    "words": _as_words,
    "substring": _as_substring,
}
