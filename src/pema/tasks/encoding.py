"""Tokenisation of filled templates; control tokens come from the template only, never from a user's text."""

from __future__ import annotations

import json
import re
import uuid
import weakref
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tokenizers import Tokenizer

from pema.errors import ConfigError, DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TYPICAL = "The house is small."
"""A probe text that shows which tokens a tokenizer adds around a text; like most sources it is a full sentence."""


class Encoding:
    """Encoder of filled templates into token ids with one tokenizer.

    The characters `</s>` in a user's text are plain text; in the template they are the control token. The ids come
    from a copy of the tokenizer in which every control token has a different, unguessable name; `mark` writes those
    names into the template. The copy is otherwise identical, so a text without control tokens gets the same ids as
    from the original tokenizer. If the tokenizer cannot be copied (a slow one), texts with a control token are refused.

    A control token is a special token of the tokenizer, or a token added to its vocabulary (`<tool_call>`). White
    space and single characters are always text.

    Attributes:
        prefix: ids of the special tokens that the tokenizer puts in front of a text; () if there are none.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Prepare the encoding of `tokenizer`.

        Raises:
            ConfigError: the tokenizer changes a text's tokens when it adds special tokens.
        """
        self._tokenizer = tokenizer
        self._copy = _copy_of(tokenizer)
        self.prefix = _prefix(tokenizer)

    def mark(self, template: str) -> str:
        """Return a template's text with its control tokens replaced by the names that `encode` knows."""
        if self._copy is None:
            return template
        names = self._copy.names
        return _any_of(names).sub(lambda control: names[control[0]], template) if names else template

    def require_text(self, text: str, where: str) -> None:
        """Refuse a user's text that contains characters which the tokenizer can only read as a control token.

        Raises:
            DataError: the text contains a control token; the message names `where` and the token.
        """
        pattern = _any_of(_controls(self._tokenizer)) if self._copy is None else self._copy.unwritable
        control = pattern.search(text) if pattern else None
        if control:
            raise DataError(
                f"{where}: {control[0]!r} is a control token of the PLM, and its tokenizer "
                f"({type(self._tokenizer).__name__}) cannot encode these characters as text: remove or change them."
            )

    def first_control(self, text: str) -> re.Match[str] | None:
        """Return the first control token in the text of a template; None if it contains none."""
        names = _controls(self._tokenizer) if self._copy is None else self._copy.names
        return _any_of(names).search(text)

    def encode(self, texts: Sequence[str]) -> list[tuple[int, ...]]:
        """Return the ids of texts without special tokens around them; names set by `mark` become control tokens."""
        if self._copy is not None:
            return [
                tuple(each.ids) for each in self._copy.backend.encode_batch_fast(list(texts), add_special_tokens=False)
            ]
        # verbose=False: the code that runs the PLM reports texts longer than the context window, with their location.
        ids = self._tokenizer(list(texts), add_special_tokens=False, return_attention_mask=False, verbose=False)
        return [tuple(each) for each in ids["input_ids"]]

    def behind(self, before: str, text: str) -> tuple[int, ...]:
        """Return the ids of `text` as a continuation of `before`, without merges across the boundary.

        Tokenizers that put a space in front of every text would put one in the middle, so `text` is encoded after an
        anchor that does not merge with it, and the result is used if it decodes to the same text.
        """
        whole = self._read(self.encode([before + text])[0])
        (start,) = self.encode([before])
        for anchor in ("", before[-1:], "a", ".", "0"):
            front, both = self.encode([anchor, anchor + text])
            if both[: len(front)] == front and self._read(start + both[len(front) :]) == whole:
                return both[len(front) :]
        return self.encode([text])[0]

    def _read(self, ids: Sequence[int]) -> str:
        if self._copy is not None:
            read: str = self._copy.backend.decode(list(ids), skip_special_tokens=False)
            return read
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))

    def begin(self, texts: Sequence[str]) -> list[tuple[int, ...]]:
        """Encode texts with the prefix in front; it is not added twice if the template already writes it."""
        n = len(self.prefix)
        return [ids if n and ids[:n] == self.prefix else self.prefix + ids for ids in self.encode(texts)]


@dataclass(frozen=True)
class _Copy:
    """A copy of a tokenizer in which control tokens have other names.

    Attributes:
        backend: the copy.
        names: the name of each control token in the copy.
        unwritable: pattern of characters that even the copy reads as a token of another kind; None if there are none.
    """

    backend: Tokenizer
    names: Mapping[str, str]
    unwritable: re.Pattern[str] | None


_COPIES: weakref.WeakKeyDictionary[Any, tuple[object, _Copy | None]] = weakref.WeakKeyDictionary()


def _copy_of(tokenizer: PreTrainedTokenizerBase) -> _Copy | None:
    """Return the copy of a fast tokenizer, made once; None if it cannot be copied."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if not isinstance(backend, Tokenizer):
        return None
    state = str(backend.get_added_tokens_decoder()), tuple(tokenizer.all_special_tokens)
    known = _COPIES.get(tokenizer)
    if known is None or known[0] != state:
        known = _COPIES[tokenizer] = state, _made(tokenizer, backend)
    return known[1]


def _made(tokenizer: PreTrainedTokenizerBase, backend: Tokenizer) -> _Copy | None:
    try:
        content = json.loads(backend.to_str())
    except Exception:  # the backend raises a bare Exception if one of its parts is written in Python.
        return None
    model = content["model"]
    pieces = model["vocab"]
    vocabulary = set(pieces) if isinstance(pieces, dict) else {piece for piece, _ in pieces}
    secret = uuid.uuid4().hex
    names = {name: f"{secret}i{i}i" for i, name in enumerate(_controls(tokenizer, vocabulary))}
    ids = {names[name]: backend.token_to_id(name) for name in names}
    for added in content["added_tokens"]:
        added["content"] = names.get(added["content"], added["content"])
    if isinstance(pieces, dict):
        model["vocab"] = {names.get(piece, piece): number for piece, number in pieces.items()}
    else:
        model["vocab"] = [[names.get(piece, piece), score] for piece, score in pieces]
    if isinstance(model.get("unk_token"), str):
        model["unk_token"] = names.get(model["unk_token"], model["unk_token"])
    if "merges" in model:
        model["merges"] = [merge for merge in model["merges"] if not _involves(merge, names)]
    content |= {"truncation": None, "padding": None, "post_processor": None}
    try:
        copy = Tokenizer.from_str(json.dumps(content))
    except Exception:  # also a bare Exception
        return None
    bare = tokenizer(TYPICAL, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
    same = copy.encode(TYPICAL, add_special_tokens=False).ids == list(bare)
    if not same or any(copy.token_to_id(name) != number for name, number in ids.items()):
        return None
    # In a Unigram model the text `<0x41>` matches the byte piece of that name; BPE never merges characters into one.
    bytes_by_name = model.get("type") == "Unigram" and model.get("byte_fallback")
    return _Copy(copy, names, re.compile("<0x[0-9A-F]{2}>") if bytes_by_name else None)


def _controls(tokenizer: PreTrainedTokenizerBase, vocabulary: Iterable[str] = ()) -> list[str]:
    """Return the names of a tokenizer's control tokens, given the pieces (`vocabulary`) of its model."""
    special = set(getattr(tokenizer, "all_special_tokens", ()))
    added = getattr(tokenizer, "added_tokens_decoder", {}).values()
    known = set(vocabulary)
    special |= {token.content for token in added if token.special or token.content not in known}
    return sorted(name for name in special if len(name) > 1 and not name.isspace())


def _involves(merge: str | Sequence[str], names: Mapping[str, str]) -> bool:
    left, right = merge.split(" ") if isinstance(merge, str) else merge
    return left in names or right in names or left + right in names


def _any_of(names: Iterable[str]) -> re.Pattern[str]:
    """Return a pattern that matches the longest of `names`, or nothing if there are none."""
    return re.compile("|".join(re.escape(name) for name in sorted(names, key=len, reverse=True)) or r"(?!)")


def _prefix(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    dressed = tuple(tokenizer(TYPICAL, return_attention_mask=False, verbose=False)["input_ids"])
    bare = tuple(tokenizer(TYPICAL, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"])
    for start in range(len(dressed) - len(bare) + 1):
        if dressed[start : start + len(bare)] == bare:
            return dressed[:start]
    raise ConfigError(f"{type(tokenizer).__name__} changes a text's tokens when it adds special tokens: not supported.")
