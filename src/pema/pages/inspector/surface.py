"""How a token looks to a reader: its text in context, or its name where it is no text of its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from transformers.convert_slow_tokenizer import bytes_to_unicode

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CONTEXT = 8
"""Tokens before a token that its text is read with: a character has at most four bytes, so at most four tokens."""

BROKEN = "\ufffd"
"""What a decoder writes for bytes that are no character."""

_BYTES = {character: byte for byte, character in bytes_to_unicode().items()}


@dataclass(frozen=True)
class Surface:
    """What to show for a token.

    Attributes:
        text: the text that it adds, spaces and line breaks included; or a name.
        is_name: whether `text` is a name: `</s>` of a special token, `0xC3` of bytes that are no whole character.
    """

    text: str
    is_name: bool = False

    def to_json(self) -> str | dict[str, str]:
        """The text itself, or `{"name": ...}`."""
        return {"name": self.text} if self.is_name else self.text


def surfaces(tokenizer: PreTrainedTokenizerBase, before: Sequence[int], tokens: Sequence[int]) -> list[Surface]:
    """What each of `tokens` adds to the text if it stands behind `before`.

    A token is decoded together with what stands before it, so that a leading space shows whatever the tokenizer, and
    the token that brings the last byte of a character shows that character. The ones that bring its other bytes show
    those bytes.
    """
    window = list(before[-CONTEXT:])
    whole = _decode(tokenizer, window).rstrip(BROKEN)
    special = set(tokenizer.all_special_ids)
    found = []
    for token in tokens:
        text = _decode(tokenizer, [*window, token])
        # Bytes that the token does not complete stay broken in front of it.
        added = text[len(whole) :].lstrip(BROKEN) if text.startswith(whole) else ""
        if token in special or not added or BROKEN in added:
            found.append(Surface(_name(tokenizer, token), is_name=True))
        else:
            found.append(Surface(added))
    return found


def _decode(tokenizer: PreTrainedTokenizerBase, tokens: list[int]) -> str:
    text: str = tokenizer.decode(tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return text


def _name(tokenizer: PreTrainedTokenizerBase, token: int) -> str:
    """The vocabulary's entry; hexadecimal where it is broken bytes in the alphabet of byte-level BPE."""
    name = tokenizer.convert_ids_to_tokens(token)
    if not name:
        return f"token {token}"
    if set(name) <= _BYTES.keys():
        data = bytes(_BYTES[character] for character in name)
        text = data.decode("utf-8", "replace")
        if BROKEN in text and text == _decode(tokenizer, [token]):
            return f"0x{data.hex().upper()}"
    return str(name)
