"""Equality of characters, and word boundaries, in all scripts."""

from __future__ import annotations

import re
import sys
import unicodedata
from collections.abc import Iterable
from functools import lru_cache

UNSPACED = (
    "\u2e80-\u2fdf\u3005-\u3007\u3031-\u3035\u3041-\u312f\u31a0-\u31bf\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
    "\U0001b000-\U0001b16f\U00020000-\U0003ffff"
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u1950-\u19df\u1a20-\u1aaf\uaa60-\uaadf"
)
"""Ranges of the scripts written without spaces between words: Han, kana, bopomofo; Thai, Lao, Myanmar, Khmer, Tai Le,
New Tai Lue, Tai Tham, Tai Viet (the ideographic and complex-context characters of UAX #14)."""

_LETTER_UNSPACED = re.compile(rf"(?=[{UNSPACED}])[^\W\d_]")
_LETTER = re.compile(r"[^\W\d_]")
HAN = re.compile("[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]")
KANA = re.compile("[\u3041-\u30ff\u31f0-\u31ff]")


def canonical(text: str) -> str:
    """Normalise `text` to composed letters (NFC), and full- and half-width forms to their usual width.

    Other compatibility characters stay unchanged: "²" differs from "2".
    """
    if text.isascii():
        return text
    composed = unicodedata.normalize("NFC", text)
    usual = (unicodedata.normalize("NFKC", each) if _has_other_width(each) else each for each in composed)
    return unicodedata.normalize("NFC", "".join(usual))


def words(text: str) -> list[str]:
    """Return the words of a text: runs of letters and digits with their combining marks (categories Mn, Mc and Me).

    In a script written without spaces each character, with its marks, is a word.
    """
    return _word().findall(canonical(text))


def tokens(text: str) -> list[str]:
    """Split a text at spaces, and in scripts written without spaces into characters with their marks."""
    return text.split() if text.isascii() else _unspaced().sub(r" \g<0> ", text).split()


def are_unspaced(texts: Iterable[str]) -> bool:
    """Return whether most letters of the texts belong to a script written without spaces."""
    letters = unspaced = 0
    for text in texts:
        letters += len(_LETTER.findall(text))
        unspaced += 0 if text.isascii() else len(_LETTER_UNSPACED.findall(text))
    return 2 * unspaced > letters


def _has_other_width(character: str) -> bool:
    return unicodedata.decomposition(character).startswith(("<wide>", "<narrow>"))


@lru_cache(maxsize=1)
def _mark() -> str:
    """Return a pattern for a combining mark, or for a zero-width joiner inside a word, which does not end the word."""
    points = map(chr, range(sys.maxunicode + 1))
    marks = re.escape("".join(each for each in points if unicodedata.category(each).startswith("M")))
    return f"(?:[{marks}]|[\u200c\u200d](?=[^\\W_]|[{marks}]))"


@lru_cache(maxsize=1)
def _unspaced() -> re.Pattern[str]:
    return re.compile(f"[^\\W_](?<=[{UNSPACED}]){_mark()}*")


@lru_cache(maxsize=1)
def _word() -> re.Pattern[str]:
    return re.compile(f"{_unspaced().pattern}|(?:(?![{UNSPACED}])[^\\W_]{_mark()}*)+")
