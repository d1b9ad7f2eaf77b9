"""Spellings of a prompt's words as single tokens: how a word that begins inside a text is written after a space."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MARKERS = ("Ġ", "▁")
"""First character of tokens that begin with a space: in byte-level vocabularies, and in those of SentencePiece."""

LONGEST = 4
"""Maximum number of tokens that one spelling replaces."""

NONE = -1
"""In place of a spelling where a token has none."""


class Spelling(NamedTuple):
    """A token that writes some tokens of a prompt after a space.

    Attributes:
        token: the token, or `NONE`.
        span: number of tokens of the prompt that it writes; 0 if there is no spelling.
    """

    token: int
    span: int


_NONE = Spelling(NONE, 0)


class Speller:
    """The spellings of token sequences in one vocabulary.

    Tokenizers write a word differently at the start of a field and after a space: `[Fitzbillies]` may be `F` `itz`
    `bill` `ies`, and `in Fitzbillies` ` Fitz` `bill` `ies`. The spelling at a token is the longest token that is a
    space and the text of this token and up to three more: ` Fitz` at `F`, with a span of 2. Tokens inside a word, and
    those that begin with a space or without a letter or digit, have none; nor has a vocabulary without such tokens.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Read the vocabulary of a tokenizer."""
        special = set(tokenizer.all_special_ids)
        names = {i: name for name, i in tokenizer.get_vocab().items() if i not in special}
        counts = {marker: sum(name.startswith(marker) for name in names.values()) for marker in MARKERS}
        self._marker = max(MARKERS, key=lambda marker: counts[marker])
        self._names = names if counts[self._marker] else {}
        self._ids = {name: i for i, name in self._names.items()}

    def __call__(self, tokens: Sequence[int]) -> list[Spelling]:
        """Return the spelling at each token."""
        names = [self._names.get(token, "") for token in tokens]
        inside = (name[-1:].isalnum() for name in ["", *names])
        return [
            _NONE if before or not name[:1].isalnum() else self._at(names[i : i + LONGEST])
            for i, (name, before) in enumerate(zip(names, inside, strict=False))
        ]

    def _at(self, names: Sequence[str]) -> Spelling:
        # An unnamed token (a control token) ends the word.
        most = names.index("") if "" in names else len(names)
        written = ((self._ids.get(self._marker + "".join(names[:n]), NONE), n) for n in range(most, 0, -1))
        return next((Spelling(*each) for each in written if each[0] != NONE), _NONE)


_SPELLERS: weakref.WeakKeyDictionary[PreTrainedTokenizerBase, Speller] = weakref.WeakKeyDictionary()


def speller_of(tokenizer: PreTrainedTokenizerBase) -> Speller:
    """Return the speller of a tokenizer, which is made once."""
    speller = _SPELLERS.get(tokenizer)
    if speller is None:
        speller = _SPELLERS[tokenizer] = Speller(tokenizer)
    return speller
