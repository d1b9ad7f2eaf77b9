"""Prompt templates: token ids, split into prompt and target at the tokenizer's own boundaries."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pema.errors import ConfigError, DataError
from pema.tasks.encoding import TYPICAL, Encoding
from pema.tasks.example import Example

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SLOT = "{source}"
CHUNK = 4096
"""Number of examples per tokenizer call: enough for its threads, few enough to bound memory."""


@dataclass(frozen=True)
class EncodedExample:
    """An example in token ids.

    Attributes:
        prompt: ids of the prompt, with the special tokens that the tokenizer puts in front, once.
        target: ids of the target and one end-of-sequence id; () if only a prompt was encoded.
        source_length: SL, the number of tokens of the source alone, without special tokens; at least 1.
    """

    prompt: tuple[int, ...]
    target: tuple[int, ...]
    source_length: int


@dataclass(frozen=True)
class Template:
    r"""A prompt [I; X]: a text with exactly one `{source}`, e.g. `Summarise this: \n{source}\nSummary:`.

    The text of an example is `prompt + separator + target`. Spaces at the end of the prompt are not part of
    it, because a tokenizer that joins a word with its leading space would split the pair elsewhere: they become the
    separator. Without any, the separator is one space, or empty if the prompt ends in a line break or a tab.
    Braces other than `{source}` are plain text. The PLM's control tokens in the template (`<|im_start|>`) are control
    tokens; the same characters in a source or a target are plain text.

    Raises:
        ConfigError: the text contains `{source}` not at all, or more than once.
    """

    text: str

    def __post_init__(self) -> None:
        slots = self.text.count(SLOT)
        if slots != 1:
            raise ConfigError(
                f"template {self.text!r} contains {SLOT} {slots} times: write it exactly once, where the source goes."
            )

    @property
    def instruction(self) -> str:
        """I, the text before the source, common to all prompts."""
        return self.text.partition(SLOT)[0]

    def fill(self, source: str) -> tuple[str, str]:
        """Return the prompt for `source` and the separator between it and a target."""
        before, _, after = self.text.partition(SLOT)
        filled = before + source + after
        prompt = filled.rstrip(" ")
        return prompt, filled[len(prompt) :] or ("" if prompt[-1:].isspace() else " ")

    def encode(
        self, tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example], *, apart: bool = False
    ) -> list[EncodedExample]:
        """Encode prompts and targets.

        `prompt + target` are the tokens of the whole text and one end-of-sequence token. They are split where the
        prompt's own tokens end; if the tokenizer merges across that boundary, after the longest common prefix.

        Args:
            tokenizer: the PLM's tokenizer, slow or fast.
            examples: the pairs of texts; their order is kept.
            apart: whether each prompt must equal the result of `encode_prompts`, so that it reveals nothing about the
                target. If the tokenizer merges across the boundary, the target's tokens are those of its text alone.

        Raises:
            DataError: a source or target is blank or tokenises to nothing; the message names `Example.where`.
            ConfigError: the tokenizer has no end-of-sequence token.
        """
        if tokenizer.eos_token_id is None:
            raise ConfigError("the tokenizer has no end-of-sequence token (eos_token), so targets cannot end: set one.")
        eos = int(tokenizer.eos_token_id)
        encoding = Encoding(tokenizer)
        marked = Template(encoding.mark(self.text))
        encoded: list[EncodedExample] = []
        for start in range(0, len(examples), CHUNK):
            chunk = examples[start : start + CHUNK]
            places = [example.where or f"example {start + i + 1}" for i, example in enumerate(chunk)]
            for example, where in zip(chunk, places, strict=True):
                if not example.target.strip():
                    raise DataError(f"{where}: the target is blank. Remove the pair or fill it in.")
                encoding.require_text(example.target, f"{where}, target")
            prompts = marked._prompts(encoding, [example.source for example in chunk], places)
            filled = [marked.fill(example.source) for example in chunk]
            wholes = encoding.begin([p + gap + example.target for (p, gap), example in zip(filled, chunk, strict=True)])
            for i, (prompt, whole) in enumerate(zip(prompts, wholes, strict=True)):
                cut = shared_length(prompt.prompt, whole)
                if apart and cut < len(prompt.prompt):
                    (text, gap), cut = filled[i], len(prompt.prompt)
                    whole = prompt.prompt + encoding.behind(text, gap + chunk[i].target)
                target = whole[cut:]
                if not target or (len(target) < 3 and _says_nothing(encoding, *filled[i], whole)):
                    said = repr(chunk[i].target)
                    raise DataError(
                        f"{places[i]}: the target {said} tokenises to nothing. Remove the pair or fill it in."
                    )
                if not cut:
                    raise DataError(
                        f"{places[i]}: the tokenizer merges the whole prompt with the target, so no context is left. "
                        "Give the template some words."
                    )
                if eos in target[:-1]:
                    raise DataError(
                        f"{places[i]}: the target contains the characters {tokenizer.eos_token!r}, which end a "
                        "sequence, before its end: remove or change them."
                    )
                if target[-1] != eos:
                    target += (eos,)
                encoded.append(EncodedExample(whole[:cut], target, prompt.source_length))
        return encoded

    def encode_prompts(self, tokenizer: PreTrainedTokenizerBase, sources: Sequence[str]) -> list[EncodedExample]:
        """Encode prompts alone, in the order of `sources`.

        Raises:
            DataError: a source is blank; the message names its number, counted from 1.
        """
        encoding = Encoding(tokenizer)
        marked = Template(encoding.mark(self.text))
        encoded: list[EncodedExample] = []
        for start in range(0, len(sources), CHUNK):
            chunk = sources[start : start + CHUNK]
            encoded += marked._prompts(encoding, chunk, [f"source {start + i + 1}" for i in range(len(chunk))])
        return encoded

    def prompt_overhead_tokens(self, tokenizer: PreTrainedTokenizerBase) -> int:
        """Count the prompt tokens that are not source tokens: SL is the length of a prompt minus this number.

        The count is exact except for tokens that the tokenizer merges across the two boundaries of the source.
        """
        (typical,) = self.encode_prompts(tokenizer, [TYPICAL])
        return len(typical.prompt) - typical.source_length

    def overhead(self, tokenizer: PreTrainedTokenizerBase) -> int:
        """Return `prompt_overhead_tokens`, its new name."""
        warnings.warn("overhead is now prompt_overhead_tokens", DeprecationWarning, stacklevel=2)
        return self.prompt_overhead_tokens(tokenizer)

    def _prompts(self, encoding: Encoding, sources: Sequence[str], places: Sequence[str]) -> list[EncodedExample]:
        """Encode the prompts of this template, whose control tokens are already marked."""
        for source, where in zip(sources, places, strict=True):
            if not source.strip():
                raise DataError(f"{where}: the source is blank. Remove it or fill it in.")
            encoding.require_text(source, f"{where}, source")
        prompts = encoding.begin([self.fill(source)[0] for source in sources])
        for prompt, where in zip(prompts, places, strict=True):
            if not prompt:
                raise DataError(f"{where}: the prompt tokenises to nothing. Remove it or give the template some words.")
        lengths = [max(1, len(ids)) for ids in encoding.encode(sources)]
        return [EncodedExample(prompt, (), length) for prompt, length in zip(prompts, lengths, strict=True)]


def shared_length(a: Sequence[int], b: Sequence[int]) -> int:
    """Return the length of the longest common prefix of two sequences."""
    shortest = min(len(a), len(b))
    if a[:shortest] == b[:shortest]:
        return shortest
    return next(i for i in range(shortest) if a[i] != b[i])


def _says_nothing(encoding: Encoding, prompt: str, separator: str, whole: tuple[int, ...]) -> bool:
    return whole in encoding.begin([prompt, prompt + separator])
