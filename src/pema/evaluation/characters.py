"""What counts as the same character, and as a word, in every script."""

from __future__ import annotations

import re
import sys
import unicodedata
from functools import lru_cache

UNSPACED = (
    "\u2e80-\u2fdf\u3005-\u3007\u3031-\u3035\u3041-\u312f\u31a0-\u31bf\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
    "\U0001b000-\U0001b16f\U00020000-\U0003ffff"
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u1950-\u19df\u1a20-\u1aaf\uaa60-\uaadf"
)
"""Ranges of the scripts that are written without spaces between words: Han, kana, bopomofo; Thai, Lao, Myanmar, Khmer,
Tai Le, New Tai Lue, Tai Tham, Tai Viet (what UAX #14 calls ideographic and complex-context characters)."""

LETTER_UNSPACED = re.compile(rf"(?=[{UNSPACED}])[^\W\d_]")
LETTER = re.compile(r"[^\W\d_]")
HAN = re.compile("[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]")
KANA = re.compile("[\u3041-\u30ff\u31f0-\u31ff]")


def canonical(text: str) -> str:
    """`text` with composed letters (NFC), and with full- and half-width forms in their usual width.

    Other compatibility characters stay what they are: "²" is not "2".
    """
    if text.isascii():
        return text
    composed = unicodedata.normalize("NFC", text)
    usual = (unicodedata.normalize("NFKC", each) if _has_other_width(each) else each for each in composed)
    return unicodedata.normalize("NFC", "".join(usual))


def words(text: str) -> list[str]:
    """The words of a text: runs of letters and digits with the marks that belong to them (categories Mn, Mc and Me).

    In a script that is written without spaces every character, with its marks, is a word.
    """
    return _word().findall(canonical(text))


def _has_other_width(character: str) -> bool:
    return unicodedata.decomposition(character).startswith(("<wide>", "<narrow>"))


@lru_cache(maxsize=1)
def _word() -> re.Pattern[str]:
    points = map(chr, range(sys.maxunicode + 1))
    marks = "".join(each for each in points if unicodedata.category(each).startswith("M"))
    # The zero-width joiners shape a word and do not end it.
    mark = f"(?:[{re.escape(marks)}]|[\u200c\u200d](?=[^\\W_]|[{re.escape(marks)}]))"
    spaced = f"(?![{UNSPACED}])[^\\W_]"
    return re.compile(f"[^\\W_](?<=[{UNSPACED}]){mark}*|(?:{spaced}{mark}*)+")
