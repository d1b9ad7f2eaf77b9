"""Comparison of the tokenizer at hand with the engine's own: they must give the same tokens."""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase

from pema.console import note
from pema.errors import MismatchError
from pema.owner.llamacpp.engine import Engine

TEXTS = (
    "Two words,\n  then 12.5 % of  Ünïcödé 😀.",
    " a space, a\ttab\r\nand 1,234,567 items -- don't!",
    "def f(x):\n        return [x**2, 'y']\n\n\n",
    "日本語とрусский язык و العربية 한국어",
    "http://example.org/?q=a&b=c_d#e <b>HTML</b>",
)
"""Texts whose tokens are compared, besides the special tokens."""


def require_same_tokens(engine: Engine, tokenizer: PreTrainedTokenizerBase, where: str) -> None:
    """Refuse an engine that has other tokens, and note a chat template that it writes differently.

    Raises:
        MismatchError: a text has other tokens; the message shows it.
    """
    special = "".join(f"{token}text" for token in tokenizer.all_special_tokens)
    for text in (*TEXTS, special):
        theirs, ours = engine.tokens(text), list(tokenizer(text).input_ids)
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
    # The engine adds the begin token when it reads the text.
    if engine.chat(messages).removeprefix(begin) != ours.removeprefix(begin):
        note(f"{where} writes a chat differently from its chat template; pema writes prompts by the template itself.")
