"""Texts to token ids, where control tokens come from the template alone: a user's characters are text."""

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
"""A text that measures what a tokenizer puts around texts; like most sources it starts a sentence and ends it."""


class Encoding:
    """What turns filled templates into token ids with one tokenizer.

    The characters `</s>` in a user's text are text, while those of the template are the control token. The ids come
    of a copy of the tokenizer in which every control token goes by another name, which nobody can guess; `mark` writes
    those names into the template. Everything else is the tokenizer's own, so a text without control tokens in it has
    the ids that the tokenizer gives. A tokenizer that cannot be copied (a slow one) refuses texts that hold one.

    A control token is one that the tokenizer calls special, or one that was added beside its vocabulary
    (`<tool_call>`). White space and single characters are text always.

    Attributes:
        prefix: ids of the special tokens that the tokenizer puts in front of a text; () where there are none.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Take a tokenizer.

        Raises:
            ConfigError: it changes a text's tokens when it adds special tokens.
        """
        self._tokenizer = tokenizer
        self._copy = _copy_of(tokenizer)
        self.prefix = _prefix(tokenizer)

    def mark(self, template: str) -> str:
        """A template's text with its control tokens under the names that `encode` knows."""
        if self._copy is None:
            return template
        names = self._copy.names
        return _any_of(names).sub(lambda control: names[control[0]], template) if names else template

    def require_text(self, text: str, where: str) -> None:
        """Refuse a user's text some of whose characters the tokenizer can only read as a control token.

        Raises:
            DataError: names `where` and the token.
        """
        pattern = _any_of(_controls(self._tokenizer)) if self._copy is None else self._copy.unwritable
        control = pattern.search(text) if pattern else None
        if control:
            raise DataError(
                f"{where}: {control[0]!r} is a control token of the PLM, and its tokenizer "
                f"({type(self._tokenizer).__name__}) cannot encode these characters as text: remove or change them."
            )

    def encode(self, texts: Sequence[str]) -> list[tuple[int, ...]]:
        """Ids of texts, without special tokens around them; control tokens are where `mark` named them."""
        if self._copy is not None:
            return [
                tuple(each.ids) for each in self._copy.backend.encode_batch_fast(list(texts), add_special_tokens=False)
            ]
        # verbose=False: texts longer than the context window are reported, with their place, by whoever runs the PLM.
        ids = self._tokenizer(list(texts), add_special_tokens=False, return_attention_mask=False, verbose=False)
        return [tuple(each) for each in ids["input_ids"]]

    def behind(self, before: str, text: str) -> tuple[int, ...]:
        """Ids of a text that stands behind another, whatever the tokenizer would merge across the border.

        Tokenizers that write a space in front of every text would write one in the middle, so the ids are taken behind
        something that they do not merge with the text, where that reads as the text does.
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
        """The same behind the prefix, which a text that begins with it by its template does not get twice."""
        n = len(self.prefix)
        return [ids if n and ids[:n] == self.prefix else self.prefix + ids for ids in self.encode(texts)]


@dataclass(frozen=True)
class _Copy:
    """A tokenizer whose control tokens go by other names.

    Attributes:
        backend: the copy.
        names: the name in the copy of each control token.
        unwritable: matches characters that even the copy reads as another token; None where there are none.
    """

    backend: Tokenizer
    names: Mapping[str, str]
    unwritable: re.Pattern[str] | None


_COPIES: weakref.WeakKeyDictionary[Any, tuple[object, _Copy | None]] = weakref.WeakKeyDictionary()


def _copy_of(tokenizer: PreTrainedTokenizerBase) -> _Copy | None:
    """The copy of a fast tokenizer, made once; None of one that cannot be copied."""
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
    except Exception:  # the backend raises a bare Exception where a part of it is written in Python.
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
    except Exception:  # bare too
        return None
    bare = tokenizer(TYPICAL, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
    same = copy.encode(TYPICAL, add_special_tokens=False).ids == list(bare)
    if not same or any(copy.token_to_id(name) != number for name, number in ids.items()):
        return None
    # A piece of a Unigram model that stands for a byte matches its own name; BPE never merges characters to one.
    bytes_by_name = model.get("type") == "Unigram" and model.get("byte_fallback")
    return _Copy(copy, names, re.compile("<0x[0-9A-F]{2}>") if bytes_by_name else None)


def _controls(tokenizer: PreTrainedTokenizerBase, vocabulary: Iterable[str] = ()) -> list[str]:
    """The names of the control tokens of a tokenizer whose model knows the pieces `vocabulary`."""
    special = set(getattr(tokenizer, "all_special_tokens", ()))
    added = getattr(tokenizer, "added_tokens_decoder", {}).values()
    known = set(vocabulary)
    special |= {token.content for token in added if token.special or token.content not in known}
    return sorted(name for name in special if len(name) > 1 and not name.isspace())


def _involves(merge: str | Sequence[str], names: Mapping[str, str]) -> bool:
    left, right = merge.split(" ") if isinstance(merge, str) else merge
    return left in names or right in names or left + right in names


def _any_of(names: Iterable[str]) -> re.Pattern[str]:
    """Matches the longest of some names; nothing where there are none."""
    return re.compile("|".join(re.escape(name) for name in sorted(names, key=len, reverse=True)) or r"(?!)")


def _prefix(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    dressed = tuple(tokenizer(TYPICAL, return_attention_mask=False, verbose=False)["input_ids"])
    bare = tuple(tokenizer(TYPICAL, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"])
    for start in range(len(dressed) - len(bare) + 1):
        if dressed[start : start + len(bare)] == bare:
            return dressed[:start]
    raise ConfigError(f"{type(tokenizer).__name__} changes a text's tokens when it adds special tokens: not supported.")
