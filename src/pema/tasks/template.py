"""Prompt templates: texts to token ids, cut into prompt and target exactly where the tokenizer cuts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pema.errors import ConfigError, DataError
from pema.tasks.example import Example

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SLOT = "{source}"
CHUNK = 4096
"""Examples that are tokenised together: enough for the tokenizer's threads, few enough to bound memory."""

TYPICAL = "The house is small."
"""The source that `Template.overhead` measures with; like most sources it starts a sentence and ends it."""


@dataclass(frozen=True)
class Encoded:
    """One example in token ids.

    Attributes:
        prompt: ids of the prompt, with the special tokens that the tokenizer itself puts in front.
        target: ids of the target and one end-of-sequence id; () where only a prompt was encoded.
        source_length: SL, the number of tokens of the source alone, without special tokens; at least 1.
    """

    prompt: tuple[int, ...]
    target: tuple[int, ...]
    source_length: int


@dataclass(frozen=True)
class Template:
    r"""A prompt [I; X]: a text that holds `{source}` exactly once, e.g. `Summarise this: \n{source}\nSummary:`.

    The text of an example is `prompt + separator + target`. Spaces at the end of the prompt are never tokenised with
    it, because a tokenizer that writes words with their leading space would cut the pair elsewhere: they become the
    separator. Without any, the separator is one space, or nothing where the prompt ends in a line break or a tab.
    Braces other than `{source}` are plain text.

    Raises:
        ConfigError: `{source}` is not in the text, or more than once.
    """

    text: str

    def __post_init__(self) -> None:
        found = self.text.count(SLOT)
        if found != 1:
            raise ConfigError(
                f"template {self.text!r} holds {SLOT} {found} times: write it exactly once, where the source belongs."
            )

    @property
    def instruction(self) -> str:
        """I, the text before the source, which all prompts share."""
        return self.text.partition(SLOT)[0]

    def fill(self, source: str) -> tuple[str, str]:
        """Return the prompt for `source` and the separator between it and a target."""
        before, _, after = self.text.partition(SLOT)
        filled = before + source + after
        prompt = filled.rstrip(" ")
        return prompt, filled[len(prompt) :] or ("" if prompt[-1:].isspace() else " ")

    def encode(self, tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example]) -> list[Encoded]:
        """Encode prompts and targets.

        `prompt + target` are the tokens of the whole text, and one end-of-sequence token. They are cut where the
        prompt's own tokens end; where the tokenizer merges across that border, at the last token that both share.

        Args:
            tokenizer: the PLM's tokenizer, slow or fast.
            examples: the pairs; the order is kept.

        Raises:
            DataError: a source or target is blank or tokenises to nothing; the message names `Example.where`.
            ConfigError: the tokenizer has no end-of-sequence token.
        """
        if tokenizer.eos_token_id is None:
            raise ConfigError(
                "the tokenizer names no end-of-sequence token (eos_token), so targets cannot end: set one."
            )
        eos = int(tokenizer.eos_token_id)
        encoded: list[Encoded] = []
        for start in range(0, len(examples), CHUNK):
            chunk = examples[start : start + CHUNK]
            places = [example.where or f"example {start + i + 1}" for i, example in enumerate(chunk)]
            for example, where in zip(chunk, places, strict=True):
                if not example.target.strip():
                    raise DataError(f"{where}: the target is blank. Remove the pair or fill it in.")
            filled = [self.fill(example.source) for example in chunk]
            prompts = self._prompts(tokenizer, [example.source for example in chunk], places)
            texts = [p + gap + example.target for (p, gap), example in zip(filled, chunk, strict=True)]
            prefix = _prefix(tokenizer, texts[0])
            wholes = [prefix + ids for ids in _tokenise(tokenizer, texts)]
            for i, (prompt, whole) in enumerate(zip(prompts, wholes, strict=True)):
                cut = shared_length(prompt.prompt, whole)
                target = whole[cut:]
                if not target or (len(target) < 3 and _says_nothing(tokenizer, prefix, *filled[i], whole)):
                    said = repr(chunk[i].target)
                    raise DataError(
                        f"{places[i]}: the target {said} tokenises to nothing. Remove the pair or fill it in."
                    )
                if not cut:
                    raise DataError(
                        f"{places[i]}: the tokenizer merges the whole prompt with the target, so no context is left. "
                        "Give the template some words."
                    )
                if target[-1] != eos:
                    target += (eos,)
                encoded.append(Encoded(whole[:cut], target, prompt.source_length))
        return encoded

    def encode_prompts(self, tokenizer: PreTrainedTokenizerBase, sources: Sequence[str]) -> list[Encoded]:
        """Encode prompts alone, in the order of `sources`.

        Raises:
            DataError: a source is blank; the message names its number, counted from 1.
        """
        encoded: list[Encoded] = []
        for start in range(0, len(sources), CHUNK):
            chunk = sources[start : start + CHUNK]
            encoded += self._prompts(tokenizer, chunk, [f"source {start + i + 1}" for i in range(len(chunk))])
        return encoded

    def overhead(self, tokenizer: PreTrainedTokenizerBase) -> int:
        """Count the prompt tokens that are not source tokens, so that SL = length of a prompt - overhead.

        Exact up to the tokens that the tokenizer merges across the source's two borders.
        """
        (typical,) = self.encode_prompts(tokenizer, [TYPICAL])
        return len(typical.prompt) - typical.source_length

    def _prompts(
        self, tokenizer: PreTrainedTokenizerBase, sources: Sequence[str], places: Sequence[str]
    ) -> list[Encoded]:
        for source, where in zip(sources, places, strict=True):
            if not source.strip():
                raise DataError(f"{where}: the source is blank. Remove it or fill it in.")
        if not sources:
            return []
        texts = [self.fill(source)[0] for source in sources]
        prefix = _prefix(tokenizer, texts[0])
        prompts = [prefix + ids for ids in _tokenise(tokenizer, texts)]
        for prompt, where in zip(prompts, places, strict=True):
            if not prompt:
                raise DataError(f"{where}: the prompt tokenises to nothing. Remove it or give the template some words.")
        lengths = [max(1, len(ids)) for ids in _tokenise(tokenizer, sources)]
        return [Encoded(prompt, (), length) for prompt, length in zip(prompts, lengths, strict=True)]


def shared_length(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the longest common prefix of two sequences."""
    shortest = min(len(a), len(b))
    if a[:shortest] == b[:shortest]:
        return shortest
    return next(i for i in range(shortest) if a[i] != b[i])


def _tokenise(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[tuple[int, ...]]:
    # verbose=False: texts longer than the context window are reported, with their place, by whoever runs the PLM.
    found = tokenizer(list(texts), add_special_tokens=False, return_attention_mask=False, verbose=False)
    return [tuple(ids) for ids in found["input_ids"]]


def _prefix(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[int, ...]:
    """Special tokens that the tokenizer puts in front of a text: () for one with no begin-of-sequence token."""
    dressed = tuple(tokenizer(text, return_attention_mask=False, verbose=False)["input_ids"])
    (bare,) = _tokenise(tokenizer, [text])
    for start in range(len(dressed) - len(bare) + 1):
        if dressed[start : start + len(bare)] == bare:
            return dressed[:start]
    raise ConfigError(f"{type(tokenizer).__name__} changes a text's tokens when it adds special tokens: not supported.")


def _says_nothing(
    tokenizer: PreTrainedTokenizerBase, prefix: tuple[int, ...], prompt: str, separator: str, whole: tuple[int, ...]
) -> bool:
    without, spaced = _tokenise(tokenizer, [prompt, prompt + separator])
    return whole in (prefix + without, prefix + spaced)
