"""The examples of a memory as token ids, all encoded and checked before the first request to the PLM."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np

from pema import console
from pema.errors import DataError
from pema.memory.shard import Integers
from pema.owner.contract import PLMDescription
from pema.tasks.example import Example
from pema.tasks.held_out import sources_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from pema.tasks.template import Template

ENCODED_AT_ONCE = 4096


class Described(Protocol):
    """A PLM as far as encoding needs it."""

    @property
    def description(self) -> PLMDescription:
        """Description of the PLM."""

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The PLM's tokenizer."""


@dataclass(frozen=True)
class Tokens:
    """Packed token ids of all examples: example i is ids[starts[i] : starts[i + 1]], its target starts at cuts[i].

    Attributes:
        ids: (total tokens,) int32.
        starts: (e + 1,) int64, first token of each example.
        cuts: (e,) int64, first target token of each example.
        source_lengths: (e,) int64, SL of each example.
        sources: (e,) int64, equal for examples of one source; None if all sources differ. See `sources_of`.
    """

    ids: np.ndarray[tuple[int], np.dtype[np.int32]]
    starts: Integers
    cuts: Integers
    source_lengths: Integers
    sources: Integers | None = None

    @classmethod
    def encode(cls, plm: Described, template: Template, examples: Sequence[Example], *, apart: bool = False) -> Tokens:
        """Encode and check every example.

        Args:
            plm: the PLM; its tokenizer and limits apply.
            template: turns sources into prompts.
            examples: the pairs of texts.
            apart: whether prompts must not depend on their targets; see `Template.encode`.

        Raises:
            DataError: an example is too long for the PLM, or its target is empty; the message names its `where`.
        """
        description = plm.description
        packed: list[np.ndarray[tuple[int], np.dtype[np.int32]]] = []
        sizes: list[tuple[int, int, int]] = []
        with console.progress("encoding", len(examples), "examples") as advance:
            for first in range(0, len(examples), ENCODED_AT_ONCE):
                block = examples[first : first + ENCODED_AT_ONCE]
                tokenizer: PreTrainedTokenizerBase = plm.tokenizer
                encoded = template.encode(tokenizer, block, apart=apart)
                for offset, (example, one) in enumerate(zip(block, encoded, strict=True)):
                    where = example.where or f"example {first + offset + 1}"
                    _check(one.prompt, one.target, description, where)
                    packed.append(np.array(one.prompt + one.target, np.int32))
                    sizes.append((len(one.prompt), len(one.target), one.source_length))
                advance(len(block))
        prompts, targets, source_lengths = np.array(sizes, np.int64).T
        starts = np.concatenate([[0], np.cumsum(prompts + targets)])
        return cls(np.concatenate(packed), starts, starts[:-1] + prompts, source_lengths, sources_of(examples))

    @property
    def target_lengths(self) -> Integers:
        """(e,): number n of target tokens of each example."""
        return self.starts[1:] - self.cuts

    def part(self, examples: range) -> Tokens:
        """Return the tokens of consecutive examples; the ids are not copied."""
        first, last = self.starts[examples.start], self.starts[examples.stop]
        here = slice(examples.start, examples.stop)
        return Tokens(
            self.ids[first:last],
            self.starts[examples.start : examples.stop + 1] - first,
            self.cuts[here] - first,
            self.source_lengths[here],
            None if self.sources is None else self.sources[here],
        )

    def sequence(self, i: int) -> list[int]:
        """Return prompt and target of example i."""
        return [int(token) for token in self.ids[self.starts[i] : self.starts[i + 1]]]

    def prompt(self, i: int) -> list[int]:
        """Return the prompt of example i."""
        return [int(token) for token in self.ids[self.starts[i] : self.cuts[i]]]

    def target(self, i: int) -> list[int]:
        """Return the target of example i."""
        return [int(token) for token in self.ids[self.cuts[i] : self.starts[i + 1]]]


def _check(prompt: tuple[int, ...], target: tuple[int, ...], plm: PLMDescription, where: str) -> None:
    if not target:
        raise DataError(f"{where}: the target tokenises to nothing: fill it in, or leave the example out.")
    if len(prompt) + len(target) > plm.max_length:
        raise DataError(
            f"{where}: prompt ({len(prompt):,} tokens) and target ({len(target):,}) are longer than the "
            f"{plm.max_length:,} tokens of the context window of {plm.name}: shorten the example, or leave it out."
        )
    highest = max(prompt + target)
    if highest >= plm.vocabulary_size:
        raise DataError(
            f"{where}: token {highest} is outside the vocabulary of {plm.name} ({plm.vocabulary_size} tokens): "
            f"tokenizer and PLM do not belong together."
        )
