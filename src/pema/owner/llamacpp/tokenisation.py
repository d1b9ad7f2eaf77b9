"""The tokenizer at hand: whether it gives the engine's own tokens, and what its tokens are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from transformers import PreTrainedTokenizerBase

from pema.console import note
from pema.errors import MismatchError
from pema.tasks.chat import end_of_turn

TEXTS = (
    "Two words,\n  then 12.5 % of  Ünïcödé 😀.",
    " a space, a\ttab\r\nand 1,234,567 items -- don't!",
    "def f(x):\n        return [x**2, 'y']\n\n\n",
    "日本語とрусский язык و العربية 한국어",
    "http://example.org/?q=a&b=c_d#e <b>HTML</b>",
)
"""Texts whose tokens are compared, besides the special tokens."""

INCOMPLETE = "\ufffd"
"""The character that stands for a part of another one."""


class Tokenises(Protocol):
    """A server that says how it reads a text."""

    def tokens(self, text: str) -> list[int] | None:
        """Return the tokens of a text, with those that begin or end every text; None if the server does not say."""

    def chat(self, messages: Sequence[dict[str, str]]) -> str | None:
        """Return messages in the model's chat template, up to where its reply begins; None if it does not say."""


def ordinary_tokens(
    tokenizer: PreTrainedTokenizerBase, ends: Sequence[int], vocabulary_size: int, count: int
) -> list[int]:
    """Return at most `count` tokens, drawn at random and in order, that are complete characters of a text.

    A special token can end a text, and llama.cpp waits for the rest of an incomplete character; in both cases it gives
    no probabilities.
    """
    special = {*tokenizer.all_special_ids, *ends, *tokenizer.added_tokens_decoder}
    size = min(vocabulary_size, len(tokenizer))
    drawn: list[int] = []
    for token in torch.randperm(size, generator=torch.Generator().manual_seed(0)).tolist():
        if len(drawn) == count:
            break
        if token not in special and INCOMPLETE not in tokenizer.decode([token]):
            drawn.append(token)
    return sorted(drawn)


def end_tokens(tokenizer: PreTrainedTokenizerBase, given: Sequence[int]) -> tuple[int, ...]:
    """Return the tokens that end a text, as `loading.eos_token_ids` does for a model of transformers."""
    others = (tokenizer.eos_token_id, end_of_turn(tokenizer))
    return tuple(sorted({*given, *(token for token in others if token is not None)}))


def require_same_tokens(engine: Tokenises, tokenizer: PreTrainedTokenizerBase, where: str) -> None:
    """Refuse an engine that has other tokens, and note a chat template that it writes differently.

    Raises:
        MismatchError: a text has other tokens; the message shows it.
    """
    special = "".join(f"{token}text" for token in tokenizer.all_special_tokens)
    for text in (*TEXTS, special):
        theirs, ours = engine.tokens(text), list(tokenizer(text).input_ids)
        if theirs is None:
            note(f"{where} does not show how it splits texts: make sure that it has exactly the tokenizer at hand.")
            return
        if theirs != ours:
            place = next((i for i, pair in enumerate(zip(theirs, ours, strict=False)) if pair[0] != pair[1]), None)
            place = min(len(theirs), len(ours)) if place is None else place
            raise MismatchError(
                f"{where} has another tokenizer: of {text!r} token {place} is {theirs[place : place + 1]}, the "
                f"tokenizer at hand gives {ours[place : place + 1]}. Give the file that the engine runs; if it "
                "is that, its tokenizer is not supported with llama.cpp."
            )
    if tokenizer.chat_template is None:
        return
    messages = [{"role": "user", "content": "Hello there"}]
    ours = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    begin = tokenizer.bos_token or ""
    theirs_chat = engine.chat(messages)
    # The engine adds the begin token when it reads the text.
    if theirs_chat is not None and theirs_chat.removeprefix(begin) != ours.removeprefix(begin):
        note(f"{where} writes a chat differently from its chat template; pema writes prompts by the template itself.")
