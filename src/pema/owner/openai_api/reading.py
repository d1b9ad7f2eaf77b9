"""Representations of texts by the proxy, at the borders of the API's tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from pema.owner.contract import PLM, ContextRepresentations
from pema.owner.openai_api.vocabulary import Vocabulary
from pema.tasks.chat import has_chat_template
from pema.tasks.encoding import Encoding
from pema.tasks.example import Example, Turn
from pema.tasks.template import Template


@dataclass(frozen=True)
class _Chain:
    """Contexts of one example of which each is the beginning of the longest.

    Attributes:
        example: index of the example.
        tokens: the proxy's tokens of the longest context.
        lengths: number of tokens of each context, by its number in the example.
    """

    example: int
    tokens: tuple[int, ...]
    lengths: dict[int, int]


class Reading:
    """The proxy's representations of contexts that are sequences of the API's tokens.

    f of a context is the proxy's representation of the context's text: the prompt in the proxy's own form (its chat
    template, if the API is asked for chats and the proxy has one), then the written text, tokenised for itself. A text
    that is longer by a few characters may have other tokens at its end, so not every context is the beginning of the
    next one: contexts that are share a pass.
    """

    def __init__(self, proxy: PLM, vocabulary: Vocabulary) -> None:
        self._proxy, self._vocabulary = proxy, vocabulary
        self._encoding = Encoding(proxy.tokenizer)

    @cached_property
    def _template(self) -> Template:
        return Template("{source}", chat=has_chat_template(self._proxy.tokenizer))

    def prompt(self, tokens: Sequence[int]) -> tuple[int, ...]:
        """Return the proxy's tokens of a prompt of the API."""
        prompt = self._vocabulary.prompt(tokens)
        if isinstance(prompt, str):
            return self._encoding.begin([prompt])[0]
        if self._template.chat:
            *history, last = prompt
            example = Example(last.content, "", history=tuple(history))
            return self._template.encode_prompts(self._proxy.tokenizer, [example])[0].prompt
        return self._encoding.begin([_plain(prompt)])[0]

    def written(self, texts: Sequence[Sequence[int]]) -> list[tuple[int, ...]]:
        """Return the proxy's tokens of what was written after prompts."""
        return self._encoding.encode([self._vocabulary.text(tokens) for tokens in texts])

    def represent(
        self, sequences: Sequence[Sequence[int]], starts: Sequence[int], batch_tokens: int, skip: frozenset[int]
    ) -> Iterator[ContextRepresentations]:
        """Represent contexts as `PLM.represent` does."""
        chains = [
            chain
            for i, (sequence, start) in enumerate(zip(sequences, starts, strict=True))
            for chain in self._chains(i, sequence[:start], sequence[start:-1])
        ]
        # The token after a context is not read.
        passes = [[*chain.tokens, chain.tokens[-1]] for chain in chains]
        least = [min(chain.lengths.values()) for chain in chains]
        parts: dict[int, dict[int, Tensor]] = {}
        skipped = frozenset(n for n, chain in enumerate(chains) if chain.example in skip)
        for answer in self._proxy.represent(passes, least, batch_tokens=batch_tokens, skip=skipped):
            chain = chains[answer.index]
            rows = parts.setdefault(chain.example, {})
            shortest = least[answer.index]
            rows |= {n: answer.representations[length - shortest] for n, length in chain.lengths.items()}
            i = chain.example
            if len(rows) == len(sequences[i]) - starts[i]:
                yield ContextRepresentations(i, torch.stack([rows[n] for n in range(len(rows))]))
                del parts[i]

    def _chains(self, example: int, prompt: Sequence[int], written: Sequence[int]) -> list[_Chain]:
        """Return the contexts after each of the written tokens, and after the prompt, in as few chains as possible."""
        begin = self.prompt(prompt)
        texts = list(self._vocabulary.borders(written))
        encoded = self._encoding.encode(texts)
        chains: list[_Chain] = []
        for n in sorted(range(len(texts)), key=lambda n: -len(encoded[n])):
            tokens = begin + encoded[n]
            chain = next((each for each in chains if each.tokens[: len(tokens)] == tokens), None)
            if chain is None:
                chain = _Chain(example, tokens, {})
                chains.append(chain)
            chain.lengths[n] = len(tokens)
        return chains


def _plain(turns: Sequence[Turn]) -> str:
    """Write the turns of a chat for a proxy without a chat template."""
    return "".join(f"{turn.content}\n\n" for turn in turns)
