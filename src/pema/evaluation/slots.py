"""Slot error rate: errors of a text about the values of its input record, as a percentage of the record's slots.

A record is a source of the form `name[The Eagle], food[Chinese], familyFriendly[yes]`. With the definition of Dušek,
Howcroft and Rieser (INLG 2019), SER = (missing + wrong + added + repeated) / slots:

- missing: the text says nothing about a slot of the record;
- wrong: it says a value other than the record's;
- added: it says a value of a slot that the record does not have, or a second value beside the right one;
- repeated: it says the right value again in the same words. Names and types of places are the subjects of sentences, so
  they may be repeated.

The slots of the E2E data are recognised by the patterns of `pema.evaluation.restaurants`. The value of any other slot
must occur literally, and can only be missing.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import ClassVar

import numpy as np

from pema.errors import ConfigError, DataError
from pema.evaluation.restaurants import GENERIC, NAMES, SLOTS, SUBJECTS, level
from pema.evaluation.score import Array, Reference, require_aligned

RECORD = re.compile(r"\s*([^,\[\]]*[^,\[\]\s])\s*\[([^\[\]]*)\]\s*(?:,|$)")
NAME, NEAR = "name", "near"
PLACES = "name, near"
"""In place of the slots of names, which are judged together: a name may stand for the other."""

GONE = " | "
"""Replacement of a recognised mention; no pattern matches across it."""


class SlotErrors:
    """Slot error rate, 0 upwards in percent of the records' slots; lower is better."""

    KINDS: ClassVar = ("missing", "wrong", "added", "repeated")

    def __init__(self, sources: Sequence[str] | None) -> None:
        """Read the records.

        Raises:
            ConfigError: there are no sources.
            DataError: a source is not a record.
        """
        if sources is None:
            raise ConfigError("slot_errors compares texts with their input records: give the sources.")
        self._records = [record(source, f"source {number}") for number, source in enumerate(sources, start=1)]

    def statistics(self, hypotheses: Sequence[str], references: Sequence[Reference]) -> Array:
        """Return (n, 5): the errors of each kind and the slots of each record; the references are not read."""
        require_aligned(hypotheses=hypotheses, sources=[""] * len(self._records))
        rows = []
        for text, slots in zip(hypotheses, self._records, strict=True):
            counts = errors(text, slots)
            rows.append([*(counts[kind] for kind in self.KINDS), len(slots)])
        return np.array(rows, np.float64)

    def value(self, totals: Array) -> float:
        """Return the errors of all kinds in percent of the slots."""
        return float(100 * totals[:-1].sum() / totals[-1])

    def signature(self, totals: Array) -> str:
        """Return the number of errors of each kind and of slots."""
        counts = "|".join(f"{kind}:{int(count)}" for kind, count in zip(self.KINDS, totals[:-1], strict=True))
        return f"SER|patterns:e2e|{counts}|slots:{int(totals[-1])}|scale:100"


def record(source: str, where: str = "source") -> dict[str, str]:
    """Read a record: its values by slot.

    Raises:
        DataError: the source is not a record; the message starts with `where`.
    """
    slots: dict[str, str] = {}
    position = 0
    while match := RECORD.match(source, position):
        slots[match[1].strip()] = match[2].strip()
        position = match.end()
    if not slots or source[position:].strip():
        raise DataError(
            f"{where}: {source!r} is not a record like 'name[The Eagle], food[Chinese]', which slot_errors needs: use "
            "another metric, or write the sources in this form."
        )
    return slots


def errors(text: str, slots: Mapping[str, str]) -> Counter[str]:
    """Count the errors of a text about a record, by kind."""
    return sum(errors_by_slot(text, slots).values(), Counter[str]())


def errors_by_slot(text: str, slots: Mapping[str, str]) -> dict[str, Counter[str]]:
    """Count the errors of a text about a record, by slot and kind; those of `name` and `near` count under `PLACES`."""
    counts: dict[str, Counter[str]] = {}
    remaining = _plain(text)
    places = [_plain(slots[slot]) for slot in (NAME, NEAR) if slot in slots]
    foreign = 0
    unsaid = 0
    # Longer names first: one may be part of another.
    for name in sorted({*places, *NAMES}, key=len, reverse=True):
        remaining, mentions = _literal(name).subn(GONE, remaining)
        unsaid += name in places and not mentions
        foreign += mentions > 0 and name not in places
    # A foreign name stands for a place that is not mentioned, or is one too many.
    wrong = min(unsaid, foreign)
    counts[PLACES] = Counter(wrong=wrong, missing=unsaid - wrong, added=foreign - wrong)
    for slot, patterns in SLOTS.items():
        readings: list[tuple[frozenset[str], str]] = []
        for values, pattern in patterns:
            if values:
                readings += [(values, match[0]) for match in pattern.finditer(remaining)]
            remaining = pattern.sub(GONE, remaining)
        counts[slot] = _judged(slot, readings, level(slot, slots[slot]) if slot in slots else None)
    for slot, value in slots.items():
        if slot not in SLOTS and slot not in (NAME, NEAR):
            counts[slot] = Counter(missing=int(not _literal(_plain(value)).search(_plain(text))))
    return counts


def _judged(slot: str, readings: Sequence[tuple[frozenset[str], str]], value: str | None) -> Counter[str]:
    """Count the errors of the mentions of one slot (the values that each may mean, and its words)."""
    right = [words for values, words in readings if value in values]
    others = {values for values, _ in readings if value not in values and not values <= GENERIC}
    counts: Counter[str] = Counter()
    if value is None or right:
        counts["added"] = len(others)
        counts["repeated"] = len(right) - len(set(right)) if slot not in SUBJECTS else 0
    elif others:
        counts.update(wrong=1, added=len(others) - 1)
    else:
        counts["missing"] = 1
    return counts


def _plain(text: str) -> str:
    """Lowercase a text, without accents; one kind of apostrophe, dash and space."""
    letters = unicodedata.normalize("NFKD", text.casefold().replace("’", "'").replace("–", "-").replace("—", ", "))
    return " ".join("".join(letter for letter in letters if not unicodedata.combining(letter)).split())


def _literal(value: str) -> re.Pattern[str]:
    """Return a pattern for a value between word boundaries; `the` in front of a name may be left out."""
    words = [re.escape(word) for word in re.split(r"[ -]+", value.removeprefix("the "))]
    return re.compile(r"(?<!\w)(?:the )?" + "[ -]+".join(words) + r"(?!\w)")
