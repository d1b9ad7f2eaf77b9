"""A PLM behind an engine that is asked for one sequence after the other."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from pema.owner.contract import BATCH_TOKENS, ContextRepresentations, PLMDescription
from pema.owner.decoding import DecodesInSessions
from pema.owner.head import Head
from pema.owner.llamacpp.session import LlamaCppSession
from pema.owner.requests import require_prompts, require_sequences, require_session


class SequentialPLM(DecodesInSessions, ABC):
    """A frozen causal language model (`contract.PLM`) whose contexts are requested sequence by sequence.

    An answer never depends on what else is computed with it.
    """

    @property
    @abstractmethod
    def description(self) -> PLMDescription:
        """Description of the PLM."""

    @property
    @abstractmethod
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The PLM's tokenizer."""

    @abstractmethod
    def head(self) -> Head:
        """Return the head bundle."""

    @abstractmethod
    def _predicted(self, index: int, prompt: Sequence[int], steps: int) -> ContextRepresentations:
        """Return the representations of the `predicted` contexts of a prompt."""

    @abstractmethod
    def _last(self, contexts: Sequence[Sequence[int]], cached: bool) -> Tensor:
        """Return f of each context, (rows, d); `cached`: the engine may use the state that it keeps."""

    def _contexts(self, tokens: Sequence[int], start: int) -> Tensor:
        """Return f of tokens[:start], ..., tokens, (n, d): one request for each."""
        return torch.cat([self._last([tokens[:end]], end > start) for end in range(start, len(tokens) + 1)])

    def represent(
        self,
        sequences: Sequence[Sequence[int]],
        starts: Sequence[int],
        *,
        batch_tokens: int = BATCH_TOKENS,
        skip: frozenset[int] = frozenset(),
    ) -> Iterator[ContextRepresentations]:
        """Represent `teacher` contexts; see `contract.PLM.represent`."""
        require_sequences(sequences, starts, self.description.max_length)
        return (
            ContextRepresentations(i, self._contexts(sequence[:-1], start))
            for i, (sequence, start) in enumerate(zip(sequences, starts, strict=True))
            if i not in skip
        )

    def predict(
        self,
        prompts: Sequence[Sequence[int]],
        steps: Sequence[int],
        *,
        batch_tokens: int = BATCH_TOKENS,
        skip: frozenset[int] = frozenset(),
    ) -> Iterator[ContextRepresentations]:
        """Represent `predicted` contexts; see `contract.PLM.predict`."""
        require_prompts(prompts, steps, self.description.max_length)
        return (
            self._predicted(i, prompt, count)
            for i, (prompt, count) in enumerate(zip(prompts, steps, strict=True))
            if i not in skip
        )

    def open_session(self, prompts: Sequence[Sequence[int]]) -> LlamaCppSession:
        """Open a decoding session; see `contract.PLM.open_session`."""
        about = self.description
        require_session(prompts, about.max_length, about.vocabulary_size)
        return LlamaCppSession(self._last, prompts, about)
