"""The visible form of a token: its text in context, or a name if it is not text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from transformers.convert_slow_tokenizer import bytes_to_unicode

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CONTEXT = 8
"""Number of previous tokens to decode with a token: a character has at most four bytes, so at most four tokens."""

BROKEN = "\ufffd"
"""Character that a decoder writes for invalid bytes."""

_BYTES = {character: byte for byte, character in bytes_to_unicode().items()}


@dataclass(frozen=True)
class Surface:
    """Visible form of a token.

    Attributes:
        text: the text that it adds, including spaces and line breaks; or a name.
        is_name: whether `text` is a name: `</s>` of a special token, `0xC3` of an incomplete character.
    """

    text: str
    is_name: bool = False

    def to_json(self) -> str | dict[str, str]:
        """Return the text itself, or `{"name": ...}`."""
        return {"name": self.text} if self.is_name else self.text


def surfaces(tokenizer: PreTrainedTokenizerBase, before: Sequence[int], tokens: Sequence[int]) -> list[Surface]:
    """Return the visible form of each of `tokens` as the next token after `before`.

    A token is decoded together with the tokens before it, so that a leading space is visible with every tokenizer, and
    the token with the last byte of a character shows that character. Tokens with its other bytes show those bytes.
    """
    window = list(before[-CONTEXT:])
    whole = _decode(tokenizer, window).rstrip(BROKEN)
    special = set(tokenizer.all_special_ids)
    visible = []
    for token in tokens:
        text = _decode(tokenizer, [*window, token])
        # Bytes that the token does not complete stay invalid in front of it.
        added = text[len(whole) :].lstrip(BROKEN) if text.startswith(whole) else ""
        if token in special or not added or BROKEN in added:
            visible.append(Surface(_name(tokenizer, token), is_name=True))
        else:
            visible.append(Surface(added))
    return visible


def _decode(tokenizer: PreTrainedTokenizerBase, tokens: list[int]) -> str:
    text: str = tokenizer.decode(tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return text


def _name(tokenizer: PreTrainedTokenizerBase, token: int) -> str:
    """Return the token's entry in the vocabulary, in hexadecimal if it is an incomplete character of byte-level BPE."""
    name = tokenizer.convert_ids_to_tokens(token)
    if not name:
        return f"token {token}"
    if set(name) <= _BYTES.keys():
        data = bytes(_BYTES[character] for character in name)
        text = data.decode("utf-8", "replace")
        if BROKEN in text and text == _decode(tokenizer, [token]):
            return f"0x{data.hex().upper()}"
    return str(name)
