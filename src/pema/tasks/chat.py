"""Chat templates: conversations written by a tokenizer's own template, which never sees the texts of the turns.

The template is rendered with an unguessable name (a slot) in the place of each text, and the texts are filled in
afterwards. So the template decides on roles, control tokens, the white space around a text and a default system prompt,
and nothing that a text contains can open or close a turn.
"""

from __future__ import annotations

import datetime
import hashlib
import re
import uuid
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from pema.errors import ConfigError, DataError
from pema.tasks.encoding import Encoding
from pema.tasks.example import Turn

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DATE = datetime.date(2024, 7, 26)
"""The date that a chat template which writes the current date is given, so that a prompt is the same on every day. It
is the date that the templates of Llama 3 write if they cannot read the clock."""

REMEDY = "use plain prompts (--no-chat; in Python Template(text, chat=False)) or another chat template."


class Filled(NamedTuple):
    """The texts of an example, with the control tokens of the template marked by `Encoding.mark`.

    Attributes:
        prompt: the prompt.
        gap: the text between prompt and target; its tokens belong to the target.
        target: the target.
        closing: the text behind the target, up to the control token that ends it; "" if the template writes none.
    """

    prompt: str
    gap: str
    target: str
    closing: str


class _Frame(NamedTuple):
    """A rendered conversation with slots instead of texts.

    Attributes:
        prompt: marked text and the numbers of slots, alternating.
        lead: the text between the prompt and the slot of the answer.
        tail: the text behind the slot of the answer.
    """

    prompt: tuple[str, ...]
    lead: str
    tail: str


class ChatTemplate:
    """The chat template of a tokenizer, ready to write conversations.

    A prompt is the text that `apply_chat_template(..., add_generation_prompt=True)` returns; prompt and target are the
    text that it returns for the whole conversation, up to the control token that ends the answer. If the template
    writes text of its own between the two (a header that ignores `add_generation_prompt`, an empty block of thoughts),
    it is part of the prompt; spaces at its end are part of the target.

    A system prompt that the template refuses or leaves out is written in front of the first turn of the user, followed
    by a blank line: the convention of the models whose templates have no system turn.

    Attributes:
        digest: SHA-256 of the template.
        closing: marked text behind an answer, up to the control token that ends it; "" if the template writes none.
        end: id of that token; None if there is none.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, encoding: Encoding) -> None:
        """Prepare the chat template of `tokenizer`.

        Raises:
            ConfigError: the tokenizer has no chat template, or one in which answers do not continue their prompts.
        """
        self._tokenizer, self._encoding = tokenizer, encoding
        text = chat_template_of(tokenizer)
        self.digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
        self._text = _without_clock(text)
        self._secret = uuid.uuid4().hex
        self._slots = re.compile(f"{self._secret}s([0-9]+)s")
        self._frames: dict[tuple[str, ...], _Frame] = {}
        zero, one, two = map(self._slot, range(3))
        try:
            tail = self._frame([("user", zero)], one).tail
        except _RefusalError as error:
            raise ConfigError(f"the chat template of the PLM's tokenizer {error}: {REMEDY}") from error
        control = encoding.first_control(tail)
        self._closing = "" if control is None else tail[: control.end()]
        self.closing = encoding.mark(self._closing)
        self.end = None if control is None else int(tokenizer.convert_tokens_to_ids(control[0]))
        self._has_system_turns = True
        try:
            self._frame([("system", zero), ("user", one)], two)
        except _RefusalError:
            self._has_system_turns = False

    def fill(self, turns: Sequence[Turn], target: str | None, where: str) -> Filled:
        """Write a conversation that ends with a turn of the user, and the answer to it.

        Args:
            turns: the turns; that of the system, if there is one, comes first.
            target: the answer; None for the prompt alone.
            where: location of the conversation, for the message.

        Raises:
            DataError: the template does not take turns in this order.
        """
        texts: list[str] = []
        messages: list[tuple[str, str]] = []
        before = ""
        for turn in turns:
            content = self._hide(turn.content, texts)
            if turn.role == "system" and not self._has_system_turns:
                before += f"{content}\n\n"
            elif turn.role == "user":
                messages.append((turn.role, before + content))
                before = ""
            else:
                messages.append((turn.role, content))
        answer = self._hide(target or "", texts)
        try:
            frame, bare = self._frame(messages, answer), self._frame(messages, answer.strip())
            if not bare.tail.startswith(self._closing):
                raise _RefusalError("does not end every answer in the same way")
        except _RefusalError as error:
            roles = ", ".join(turn.role for turn in turns)
            raise DataError(
                f"{where}: the chat template of the PLM's tokenizer {error} (the turns are {roles}): change or remove "
                f"the conversation, or {REMEDY}"
            ) from error
        lead = bare.lead.rstrip(" ")
        gap, kept = frame.lead.removeprefix(lead), frame.tail.removesuffix(bare.tail)
        mark = self._encoding.mark
        prompt = "".join(texts[int(part)] if i % 2 else part for i, part in enumerate(frame.prompt))
        return Filled(prompt + mark(lead), mark(gap), texts[-1] + kept, self.closing)

    def _slot(self, number: int) -> str:
        return f"{self._secret}s{number}s"

    def _hide(self, text: str, texts: list[str]) -> str:
        """Append `text` without the white space around it to `texts`; return its slot with that white space."""
        core = text.strip()
        start = text.index(core)
        texts.append(core)
        return text[:start] + self._slot(len(texts) - 1) + text[start + len(core) :]

    def _frame(self, messages: Sequence[tuple[str, str]], answer: str) -> _Frame:
        """Return the rendered conversation, from the second time on without rendering it.

        Raises:
            _RefusalError: the template refuses the turns, changes a text, or writes an answer behind another prompt.
        """
        key = (*(part for message in messages for part in message), answer)
        if key not in self._frames:
            prompt = self._render(messages, generation=True)
            whole = self._render([*messages, ("assistant", answer)], generation=False)
            slots = sorted(int(slot) for _, content in messages for slot in self._slots.findall(content))
            if sorted(map(int, self._slots.findall(prompt))) != slots:
                raise _RefusalError("does not write every turn once")
            head, slot, tail = whole.partition(answer.strip())
            if not slot or not head.startswith(prompt) or self._slots.search(head[len(prompt) :] + tail):
                raise _RefusalError("does not write an answer as the continuation of its prompt")
            parts = self._slots.split(prompt)
            parts[::2] = map(self._encoding.mark, parts[::2])
            self._frames[key] = _Frame(tuple(parts), head[len(prompt) :], tail)
        return self._frames[key]

    def _render(self, messages: Sequence[tuple[str, str]], *, generation: bool) -> str:
        try:
            return str(
                self._tokenizer.apply_chat_template(
                    [{"role": role, "content": content} for role, content in messages],
                    chat_template=self._text,
                    tokenize=False,
                    add_generation_prompt=generation,
                )
            )
        except Exception as error:  # a template is a program: it may raise anything, and refuses turns by raising.
            raise _RefusalError(f"refuses the turns ({str(error) or type(error).__name__})") from error


class _RefusalError(Exception):
    """A chat template that refuses a conversation; the message continues a sentence about the template."""


def chat_template_of(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the text of a tokenizer's chat template.

    Raises:
        ConfigError: it has none.
    """
    if not has_chat_template(tokenizer):
        raise ConfigError(
            "the PLM's tokenizer has no chat template: leave out --chat (in Python chat=True), or add the template to "
            "the PLM's folder as chat_template.jinja."
        )
    try:
        return str(tokenizer.get_chat_template())
    except ValueError as error:
        raise ConfigError(f"the PLM's tokenizer has several chat templates and no default one: {REMEDY}") from error


def has_chat_template(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Return whether a tokenizer has a chat template."""
    return bool(getattr(tokenizer, "chat_template", None))


def end_of_turn(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Return the token that ends an answer in a tokenizer's chat template; None if it has no usable template."""
    if not has_chat_template(tokenizer):
        return None
    try:
        return ChatTemplate(tokenizer, Encoding(tokenizer)).end
    except ConfigError:
        return None


def _without_clock(text: str) -> str:
    """Return a chat template in which the function that reads the clock is replaced by one that knows `DATE` only."""
    if "strftime_now" not in text:
        return text
    replaced = "".join(f"|replace('%{code}', '{written}')" for code, written in _WRITTEN.items())
    # The last expression keeps the white space at the start of the template, which the end of a block would remove.
    return "{%- macro strftime_now(format) -%}{{ format" + replaced + " }}{%- endmacro %}{{ '' }}" + text


_WRITTEN = {"-d": str(DATE.day), "-m": str(DATE.month), **{code: DATE.strftime(f"%{code}") for code in "aAbBdmyYjHMS"}}
"""What the codes of `strftime` write."""
