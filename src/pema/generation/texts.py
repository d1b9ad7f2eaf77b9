"""The text of generated tokens: where it ends, and why."""

from __future__ import annotations

import bisect
import re
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FinishReason = Literal["eos_token", "stop_string", "length", "stopping_criteria"]
"""Why a text ended: by the PLM's choice, at a stop string, at its token limit, by a criterion of the user's own."""

HALF = re.compile("[\ufffd\u200d]+$")
"""Remainder of a truncated character: invalid bytes, or a joiner with nothing after it."""


class TokenLimits:
    """Stopping criterion that ends each row at its own number of new tokens, so rows do not affect each other.

    `limits` is (items,); the rows of one item (beams) are adjacent.
    """

    def __init__(self, prompt_columns: int, limits: Tensor) -> None:
        self._last = prompt_columns + limits

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:  # noqa: ANN401
        """Return (rows,) bool: which rows are finished."""
        rows = len(input_ids) // len(self._last)
        return input_ids.shape[1] >= self._last.to(input_ids.device).repeat_interleave(rows)


class StopStrings:
    """Stopping criterion that ends each row when its text contains a stop string; rows do not affect each other.

    It compares texts: a stop string may begin and end inside tokens, and never begins in the prompt.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, prompt_columns: int, stop: Sequence[str]) -> None:
        self._tokenizer, self._columns, self._stop = tokenizer, prompt_columns, stop
        # A token has at least one byte. One more, because decoders drop the space in front of their first token.
        self._window = 1 + max(len(each.encode()) for each in stop)

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:  # noqa: ANN401
        """Return (rows,) bool: which rows are finished."""
        rows = input_ids[:, self._columns :].tolist()
        return torch.tensor([self._ends(row) for row in rows], device=input_ids.device)

    def _ends(self, row: list[int]) -> bool:
        # Only the last token is new, so most steps need to decode the last tokens only.
        tail = _raw(self._tokenizer, row[-self._window :])
        return any(each in tail for each in self._stop) and _first(_raw(self._tokenizer, row), self._stop) is not None


def text_of(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int], cut: bool) -> str:
    """Decode generated tokens to a text without white space around it, which may have several lines.

    An incomplete character at the end of a truncated text is dropped.
    """
    text: str = tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return (HALF.sub("", text) if cut else text).strip()


def stopped(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int], stop: Sequence[str]) -> tuple[int, str] | None:
    """Return what precedes the first stop string of generated tokens, or None if they contain none.

    White space at the beginning is not part of the text, so no stop string is found in it: a PLM that puts a line break
    in front of its answer has answered. Control tokens are compared by their names, such as `<|im_end|>`.

    Returns:
        The number of tokens up to the one that completes the stop string, and the text before the stop string.
    """
    text = _raw(tokenizer, tokens)
    if _first(text, stop) is None:
        return None
    count = bisect.bisect_left(
        range(len(tokens)), True, key=lambda n: _first(_raw(tokenizer, tokens[:n]), stop) is not None
    )
    text = _raw(tokenizer, tokens[:count])
    before = text[: _first(text, stop)]
    whole = next(n for n in range(count, -1, -1) if before.startswith(_raw(tokenizer, tokens[:n])))
    rest = before[len(_raw(tokenizer, tokens[:whole])) :]
    return count, (tokenizer.decode(tokens[:whole], skip_special_tokens=True, **_PLAIN) + rest).strip()


def finished(
    tokenizer: PreTrainedTokenizerBase,
    tokens: Sequence[int],
    ends: Collection[int],
    stop: Sequence[str],
    *,
    by_criterion: bool = False,
) -> tuple[str, int, FinishReason]:
    """Return the text of a row that has ended, the number of its tokens, and why it ended.

    Args:
        tokenizer: the PLM's tokenizer.
        tokens: the generated tokens, with the one that ends the text if there is one.
        ends: the tokens that end a text.
        stop: the stop strings.
        by_criterion: whether a criterion of the user's own ended it, unless it ended by itself.
    """
    before = stopped(tokenizer, tokens, stop) if stop else None
    if before is not None:
        return before[1], before[0], "stop_string"
    if tokens and tokens[-1] in ends:
        # Not every tokenizer counts the token that ends a turn among its special tokens.
        return text_of(tokenizer, tokens[:-1], False), len(tokens), "eos_token"
    reason: FinishReason = "stopping_criteria" if by_criterion else "length"
    return text_of(tokenizer, tokens, not by_criterion), len(tokens), reason


def _first(text: str, stop: Sequence[str]) -> int | None:
    """Return the position of the first stop string in a text after its leading white space, or None."""
    start = len(text) - len(text.lstrip())
    return min((place for each in stop if (place := text.find(each, start)) >= 0), default=None)


_PLAIN = {"clean_up_tokenization_spaces": False}


def _raw(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int]) -> str:
    """Decode tokens, control tokens included."""
    text: str = tokenizer.decode(tokens, skip_special_tokens=False, **_PLAIN)
    return text
