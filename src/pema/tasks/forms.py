"""The two forms of a prompt: plain text, and a chat in the chat template of the tokenizer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING

from pema.errors import ConfigError, DataError
from pema.schema import short
from pema.tasks.chat import ChatTemplate, Filled, has_chat_template
from pema.tasks.encoding import Encoding
from pema.tasks.example import Example, Turn

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SLOT = "{source}"
FEW = 3
"""Fewer tokens than this after a prompt, without the closing text, may be only a separator and an end."""


def fill(text: str, source: str) -> tuple[str, str]:
    """Return the plain prompt of a template's text for `source`, and the separator between it and a target."""
    filled = text.replace(SLOT, source)
    prompt = filled.rstrip(" ")
    return prompt, filled[len(prompt) :] or ("" if prompt[-1:].isspace() else " ")


class Form(ABC):
    """A form of prompts, with one tokenizer.

    Attributes:
        encoding: the encoding of the tokenizer.
        end: the token that ends a target; None if there is none.
        chat_template: SHA-256 of the chat template; None for plain prompts.
    """

    def __init__(
        self, encoding: Encoding, end: int | None, *, chat_template: str | None = None, closing: str = ""
    ) -> None:
        self.encoding = encoding
        self.end = end
        self.chat_template = chat_template
        self._few = FEW + len(encoding.encode([closing])[0])

    def fill(self, example: Example, target: str | None, where: str) -> Filled:
        """Write the texts of an example.

        Args:
            example: the source and its history; its target is not read.
            target: the target; None for the prompt alone.
            where: location of the example, for messages.

        Raises:
            DataError: the source is blank, the history does not fit, or a text contains characters that the tokenizer
                cannot encode as text.
        """
        if not example.source.strip():
            raise DataError(f"{where}: the source is blank. Remove it or fill it in.")
        self.encoding.require_text(example.source, f"{where}, source")
        if target is not None:
            self.encoding.require_text(target, f"{where}, target")
        for turn in example.history:
            self.encoding.require_text(turn.content, f"{where}, {turn.role} turn")
        return self._write(example, target, where)

    @abstractmethod
    def _write(self, example: Example, target: str | None, where: str) -> Filled:
        """Write texts that can be encoded as text."""

    @abstractmethod
    def encode(self, texts: Sequence[str]) -> list[tuple[int, ...]]:
        """Return the ids of texts that begin with a prompt."""

    def says_nothing(self, filled: Filled, whole: tuple[int, ...], behind: int) -> bool:
        """Return whether the target of a filled example tokenises to nothing.

        Args:
            filled: the texts.
            whole: the ids of all of them.
            behind: number of ids in `whole` behind the prompt.
        """
        if behind >= self._few:
            return False
        without = (filled.prompt + filled.closing, filled.prompt + filled.gap + filled.closing)
        return whole in self.encode(without)


class PlainForm(Form):
    """Plain prompts, with the special tokens that the tokenizer puts in front of a text."""

    def __init__(self, text: str, tokenizer: PreTrainedTokenizerBase, encoding: Encoding) -> None:
        super().__init__(encoding, tokenizer.eos_token_id)
        self._text = encoding.mark(text)

    def _write(self, example: Example, target: str | None, where: str) -> Filled:
        if example.history:
            raise DataError(
                f"{where}: the example has {len(example.history)} earlier turns, and plain prompts have no place for "
                "them: use a PLM with a chat template, without --no-chat (in Python chat=False), or remove the turns."
            )
        prompt, gap = fill(self._text, example.source)
        return Filled(prompt, gap, target or "", "")

    def encode(self, texts: Sequence[str]) -> list[tuple[int, ...]]:
        """Return the ids of texts that begin with a prompt."""
        return self.encoding.begin(texts)


class ChatForm(Form):
    """Prompts in the chat template of the tokenizer, which writes all special tokens itself."""

    def __init__(self, text: str, system: str | None, tokenizer: PreTrainedTokenizerBase, encoding: Encoding) -> None:
        self._chat = ChatTemplate(tokenizer, encoding)
        end = tokenizer.eos_token_id if self._chat.end is None else self._chat.end
        super().__init__(encoding, end, chat_template=self._chat.digest, closing=self._chat.closing)
        if system is not None:
            encoding.require_text(system, "the system prompt")
        self._text, self._system = text, () if system is None else (Turn("system", system),)

    def _write(self, example: Example, target: str | None, where: str) -> Filled:
        system = () if any(turn.role == "system" for turn in example.history) else self._system
        user = Turn("user", self._text.replace(SLOT, example.source))
        return self._chat.fill((*system, *example.history, user), target, where)

    def encode(self, texts: Sequence[str]) -> list[tuple[int, ...]]:
        """Return the ids of texts that begin with a prompt."""
        return self.encoding.encode(texts)


def form_of(text: str, chat: bool | None, system: str | None, tokenizer: PreTrainedTokenizerBase) -> Form:
    """Return the form of a template's prompts with a tokenizer.

    Args:
        text: the template's text.
        chat: whether prompts are written as a chat; None: if the tokenizer has a chat template, and the text does not
            contain control tokens of its own.
        system: system prompt of the chat.
        tokenizer: the PLM's tokenizer.

    Raises:
        ConfigError: a chat or a system prompt that is impossible with this text or tokenizer.
    """
    encoding = Encoding(tokenizer)
    control = encoding.first_control(text)
    if chat or (chat is None and control is None and has_chat_template(tokenizer)):
        if control is not None:
            raise ConfigError(
                f"template {text!r} contains the control token {control[0]!r}, but in a chat the chat template writes "
                "all control tokens: remove it, or use plain prompts (--no-chat; in Python chat=False)."
            )
        return ChatForm(text, system, tokenizer, encoding)
    if system is not None:
        why = "the PLM's tokenizer has no chat template"
        if control is not None:
            why = f"the template contains the control token {control[0]!r}, so its prompts are plain"
        raise ConfigError(
            f"the system prompt {short(system)} needs a chat, but {why}: leave it out, or write it into the template."
        )
    return PlainForm(text, tokenizer, encoding)
