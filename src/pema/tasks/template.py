"""Prompt templates: token ids, split into prompt and target at the tokenizer's own boundaries."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from pema.errors import ConfigError, DataError
from pema.schema import short
from pema.tasks.encoding import TYPICAL
from pema.tasks.example import Example
from pema.tasks.forms import SLOT, Form, fill, form_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CHUNK = 4096
"""Number of examples per tokenizer call: enough for its threads, few enough to bound memory."""


@dataclass(frozen=True)
class EncodedExample:
    """An example in token ids.

    Attributes:
        prompt: ids of the prompt, with the special tokens that the tokenizer puts in front, once.
        target: ids of the target and of the token that ends it; () if only a prompt was encoded.
        source_length: SL, the number of tokens of the source alone, without special tokens; at least 1.
    """

    prompt: tuple[int, ...]
    target: tuple[int, ...]
    source_length: int


@dataclass(frozen=True)
class Template:
    r"""A prompt [I; X]: a text with exactly one `{source}`, e.g. `Summarise this: \n{source}\nSummary:`.

    Braces other than `{source}` are plain text. A prompt is written in one of two ways:

    - As a chat, with the chat template of the PLM's tokenizer: the text with the source in it is the turn of the user,
      after the system prompt and the turns of `Example.history`; the target is the answer, and the token that ends the
      answer in the chat template is its last one. All texts are plain text: they cannot open or close a turn.
    - Plain: the text of an example is `prompt + separator + target` and the end-of-sequence token. Spaces at the end of
      the prompt are not part of it, because a tokenizer that joins a word with its leading space would split the pair
      elsewhere: they become the separator. Without any, the separator is one space, or empty if the prompt ends in a
      line break or a tab. The PLM's control tokens in the template (`<|im_start|>`) are control tokens; the same
      characters in a source or a target are plain text.

    Attributes:
        text: the text with `{source}` in it.
        chat: whether prompts are written as a chat; None: if the tokenizer has a chat template, and the text does not
            contain control tokens itself.
        system: system prompt of the chat; None: whatever the chat template writes without one. A system turn in
            `Example.history` takes its place.

    Raises:
        ConfigError: the text contains `{source}` not at all, or more than once; the system prompt is blank, or given
            for plain prompts.
    """

    text: str
    chat: bool | None = None
    system: str | None = None

    def __post_init__(self) -> None:
        slots = self.text.count(SLOT)
        if slots != 1:
            raise ConfigError(
                f"template {self.text!r} contains {SLOT} {slots} times: write it exactly once, where the source goes."
            )
        if self.system is not None and not self.system.strip():
            raise ConfigError("the system prompt is blank: fill it in, or leave it out.")
        if self.system is not None and self.chat is False:
            raise ConfigError(f"the system prompt {short(self.system)} needs a chat: leave it out, or set chat=True.")

    @property
    def instruction(self) -> str:
        """I, the text before the source, common to all prompts."""
        return self.text.partition(SLOT)[0]

    def fill(self, source: str) -> tuple[str, str]:
        """Return the plain prompt for `source` and the separator between it and a target."""
        return fill(self.text, source)

    def settled(self, tokenizer: PreTrainedTokenizerBase) -> Template:
        """Return this template with the choice between chat and plain prompts made.

        Raises:
            ConfigError: the choice, or the system prompt, is impossible with this tokenizer.
        """
        return replace(self, chat=self.chat_template(tokenizer) is not None)

    def chat_template(self, tokenizer: PreTrainedTokenizerBase) -> str | None:
        """Return the SHA-256 of the chat template that the prompts are written with; None if they are plain.

        Raises:
            ConfigError: as `settled`.
        """
        return form_of(self.text, self.chat, self.system, tokenizer).chat_template

    def record(self, tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
        """Return everything that the prompts depend on, apart from sources and tokenizer; JSON-ready.

        Raises:
            ConfigError: as `settled`.
        """
        digest = self.chat_template(tokenizer)
        chat = {} if digest is None else {"chat_template": digest}
        return {"template": self.text} | chat | ({} if self.system is None else {"system": self.system})

    def end(self, tokenizer: PreTrainedTokenizerBase) -> int | None:
        """Return the token that ends a target; None if the tokenizer has none.

        Raises:
            ConfigError: as `settled`.
        """
        return form_of(self.text, self.chat, self.system, tokenizer).end

    def encode(
        self, tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example], *, apart: bool = False
    ) -> list[EncodedExample]:
        """Encode prompts and targets.

        `prompt + target` are the tokens of the whole text and of the token that ends it. They are split where the
        prompt's own tokens end; if the tokenizer merges across that boundary, after the longest common prefix.

        Args:
            tokenizer: the PLM's tokenizer, slow or fast.
            examples: the pairs of texts; their order is kept.
            apart: whether each prompt must equal the result of `encode_prompts`, so that it reveals nothing about the
                target. If the tokenizer merges across the boundary, the target's tokens are those of its text alone.

        Raises:
            DataError: a source or target is blank or tokenises to nothing, or an example has a history and the prompts
                are plain; the message names `Example.where`.
            ConfigError: the tokenizer has no token that ends a target; as `settled`.
        """
        form = form_of(self.text, self.chat, self.system, tokenizer)
        if form.end is None:
            raise ConfigError("the tokenizer has no end-of-sequence token (eos_token), so targets cannot end: set one.")
        encoded: list[EncodedExample] = []
        for start in range(0, len(examples), CHUNK):
            chunk = examples[start : start + CHUNK]
            places = [example.where or f"example {start + i + 1}" for i, example in enumerate(chunk)]
            for example, where in zip(chunk, places, strict=True):
                if not example.target.strip():
                    raise DataError(f"{where}: the target is blank. Remove the pair or fill it in.")
            filled = [form.fill(example, example.target, where) for example, where in zip(chunk, places, strict=True)]
            prompts = form.encode([each.prompt for each in filled])
            wholes = form.encode(["".join(each) for each in filled])
            lengths = _source_lengths(form, chunk)
            for i, (each, prompt, whole) in enumerate(zip(filled, prompts, wholes, strict=True)):
                where = places[i]
                _require_tokens(prompt, where)
                cut = shared_length(prompt, whole)
                if apart and cut < len(prompt):
                    cut = len(prompt)
                    whole = prompt + form.encoding.behind(each.prompt, "".join(each[1:]))
                target = whole[cut:]
                if not target or form.says_nothing(each, whole, len(target)):
                    raise DataError(
                        f"{where}: the target {chunk[i].target!r} tokenises to nothing. Remove the pair or fill it in."
                    )
                if not cut:
                    raise DataError(
                        f"{where}: the tokenizer merges the whole prompt with the target, so no context is left. "
                        "Give the template some words."
                    )
                if form.end in target[:-1]:
                    raise DataError(
                        f"{where}: the target contains the characters {tokenizer.convert_ids_to_tokens(form.end)!r}, "
                        "which end a sequence, before its end: remove or change them."
                    )
                if target[-1] != form.end:
                    target += (form.end,)
                encoded.append(EncodedExample(whole[:cut], target, lengths[i]))
        return encoded

    def encode_prompts(
        self, tokenizer: PreTrainedTokenizerBase, sources: Sequence[str | Example]
    ) -> list[EncodedExample]:
        """Encode prompts alone, in the order of `sources`.

        Args:
            tokenizer: the PLM's tokenizer, slow or fast.
            sources: the sources; an example stands for its source and its history.

        Raises:
            DataError: a source is blank, or has a history and the prompts are plain; the message names its number,
                counted from 1, or its `Example.where`.
            ConfigError: as `settled`.
        """
        form = form_of(self.text, self.chat, self.system, tokenizer)
        encoded: list[EncodedExample] = []
        for start in range(0, len(sources), CHUNK):
            chunk = [
                each if isinstance(each, Example) else Example(each, "") for each in sources[start : start + CHUNK]
            ]
            places = [each.where or f"source {start + i + 1}" for i, each in enumerate(chunk)]
            filled = [form.fill(each, None, where) for each, where in zip(chunk, places, strict=True)]
            prompts = form.encode([each.prompt for each in filled])
            for prompt, where in zip(prompts, places, strict=True):
                _require_tokens(prompt, where)
            lengths = _source_lengths(form, chunk)
            encoded += [EncodedExample(prompt, (), length) for prompt, length in zip(prompts, lengths, strict=True)]
        return encoded

    def prompt_overhead_tokens(self, tokenizer: PreTrainedTokenizerBase) -> int:
        """Count the prompt tokens that are not source tokens: SL is the length of a prompt minus this number.

        The count is exact except for tokens that the tokenizer merges across the two boundaries of the source, and for
        prompts without a history.
        """
        (typical,) = self.encode_prompts(tokenizer, [TYPICAL])
        return len(typical.prompt) - typical.source_length

    def overhead(self, tokenizer: PreTrainedTokenizerBase) -> int:
        """Return `prompt_overhead_tokens`, its new name."""
        warnings.warn("overhead is now prompt_overhead_tokens", DeprecationWarning, stacklevel=2)
        return self.prompt_overhead_tokens(tokenizer)


def describe_prompts(chat_template: str | None, system: str | None) -> str:
    """Return the form of prompts in words, for messages."""
    if chat_template is None:
        return "plain prompts"
    prompt = "no system prompt" if system is None else f"the system prompt {short(system)}"
    return f"chat prompts with {prompt} and the chat template {chat_template[:12]}"


def shared_length(a: Sequence[int], b: Sequence[int]) -> int:
    """Return the length of the longest common prefix of two sequences."""
    shortest = min(len(a), len(b))
    if a[:shortest] == b[:shortest]:
        return shortest
    return next(i for i in range(shortest) if a[i] != b[i])


def _require_tokens(prompt: Sequence[int], where: str) -> None:
    if not prompt:
        raise DataError(f"{where}: the prompt tokenises to nothing. Remove it or give the template some words.")


def _source_lengths(form: Form, examples: Sequence[Example]) -> list[int]:
    return [max(1, len(ids)) for ids in form.encoding.encode([example.source for example in examples])]
