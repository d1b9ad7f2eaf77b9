"""A PLM on a server that gives the vectors its LM head reads, behind the owner's contract."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from pema.console import note
from pema.errors import MismatchError
from pema.files import digest
from pema.owner import loading
from pema.owner.client.connection import Connection
from pema.owner.contract import ContextRepresentations, PLMDescription
from pema.owner.engines.norms import require_after_norm
from pema.owner.head import Head
from pema.owner.llamacpp.material import Material
from pema.owner.llamacpp.probe import LIKELIEST, TEXTS, TOLERANCE, Measure, deviation_from, fitting
from pema.owner.llamacpp.sequential import SequentialPLM
from pema.owner.llamacpp.tokenisation import require_same_tokens
from pema.owner.logprobs.api import About, TopK
from pema.owner.logprobs.completions import tokens_of


@dataclass(frozen=True)
class VectorServer:
    """A server that gives one vector a token.

    Every request sets all that decides its answer, so that the defaults that a server was started with do not matter.

    Attributes:
        connection: the connection to it.
        about: what it says of its model.
    """

    connection: Connection
    about: About

    @property
    def where(self) -> str:
        """Its address, for messages."""
        return self.connection.url

    def tokens(self, text: str) -> list[int] | None:
        """See `tokenisation.Tokenises`."""
        return tokens_of(self.connection, self.about.model, text)

    def chat(self, messages: Sequence[dict[str, str]]) -> None:
        """See `tokenisation.Tokenises`; it does not say."""

    @abstractmethod
    def vectors(self, tokens: Sequence[int], d: int) -> Tensor:
        """Return the vector after each token, (n, d) float32.

        Raises:
            OwnerError: it gives none, or not one a token.
        """


class EnginePLM(SequentialPLM):
    """A frozen causal language model on a server that gives vectors.

    `teacher` contexts are one request a sequence. The subclass says how f of a step and a greedy text are requested.

    Attributes:
        engine: the server's program.
        deviation: how much head(f) differs from the engine's log-probabilities of the likeliest tokens; None if it
            gives none, so that the vectors were held against the final norm.
    """

    engine: ClassVar[str]
    deviation: float | None

    def __init__(self, at_hand: Material, server: VectorServer) -> None:
        """Probe the server.

        Args:
            at_hand: what is known of the model.
            server: the server.

        Raises:
            OwnerError: it does not give what is needed.
            MismatchError: it has another tokenizer, or returns other vectors than its head reads.
        """
        self._at_hand, self._server = at_hand, server
        require_same_tokens(server, at_hand.tokenizer, server.where)
        prompts = [list(at_hand.tokenizer(text).input_ids) for text in TEXTS]
        vectors = torch.stack([server.vectors(prompt, at_hand.heads[0].d)[-1] for prompt in prompts])
        size = at_hand.heads[0].vocabulary_size
        given = self._likeliest(prompts, min(LIKELIEST, size))
        if given is None:
            self._head, self.deviation = require_after_norm(at_hand, vectors, server.where), None
            note(
                f"{at_hand.name}: {server.where} gives no log-probabilities, so its vectors were held against the "
                "final norm only: make sure that it runs this model."
            )
        else:
            if int(given.tokens.max()) >= size or int(given.tokens.min()) < 0:
                raise MismatchError(
                    f"{server.where} runs another model than {at_hand.name}: it has token {int(given.tokens.max()):,}, "
                    f"outside the vocabulary of {size:,} tokens."
                )
            rows = zip(given.tokens.tolist(), given.values, strict=True)
            measures = [Measure(at_hand, tokens, values) for tokens, values in rows]
            self._head, self.deviation = fitting(at_hand, measures, vectors, server.where)
            if self._prepare_steps():
                self._require_steps(prompts, measures)
            note(
                f"{at_hand.name}: head(f) differs from the engine's own log-probabilities by {self.deviation:.2%} (at "
                f"most {TOLERANCE:.0%} is accepted)."
            )

    @abstractmethod
    def _likeliest(self, contexts: Sequence[Sequence[int]], count: int) -> TopK | None:
        """Return at most `count` likeliest next tokens after each context; None if there are no log-probabilities."""

    def _prepare_steps(self) -> bool:
        """Prepare the steps, after the head is known; return whether f of a step is requested in another way."""
        return True

    @abstractmethod
    def _greedy(self, prompt: Sequence[int], steps: int) -> tuple[list[int], Tensor]:
        """Return the greedy text up to its end, at most `steps` tokens, and f of the context of each."""

    def _require_steps(self, prompts: Sequence[Sequence[int]], measures: Sequence[Measure]) -> None:
        """Refuse a server whose steps give other log-probabilities than a prompt that is read anew."""
        self._last([prompt[:-1] for prompt in prompts], False)
        deviation = deviation_from(measures, self._head, self._last(prompts, True))
        if deviation > TOLERANCE:
            raise MismatchError(
                f"{self._server.where} answers differently in steps: the deviation is {deviation:.0%}, at most "
                f"{TOLERANCE:.0%} is accepted. Check that no cache is shared with another model."
            )

    @cached_property
    def description(self) -> PLMDescription:
        """Description of the PLM."""
        about, at_hand, head = self._server.about, self._at_hand, self._head
        tokenizer = loading.tokenizer_fingerprints(at_hand.tokenizer)
        identity = {"engine": self.engine, "model": about.model, "head": head.fingerprint}
        return PLMDescription(
            name=at_hand.name,
            architecture=self.engine,
            fingerprint=digest(identity),
            tokenizer_fingerprint=tokenizer.current,
            head_fingerprint=head.fingerprint,
            d=head.d,
            d_tap=head.d_tap,
            vocabulary_size=head.vocabulary_size,
            tap="head_input",
            # A completion needs a place for the token that follows.
            max_length=min(at_hand.max_length, about.context or loading.NO_LIMIT) - 1,
            eos_token_ids=at_hand.ends,
            parameters=at_hand.parameters or 1,
            weights=f"run by {self.engine}",
            earlier_tokenizers=tokenizer.earlier,
        )

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The PLM's tokenizer."""
        return self._at_hand.tokenizer

    def head(self) -> Head:
        """Return the head bundle."""
        return self._head

    def _contexts(self, tokens: Sequence[int], start: int) -> Tensor:
        return self._server.vectors(tokens, self._head.d)[start - 1 :].clone()

    def _predicted(self, index: int, prompt: Sequence[int], steps: int) -> ContextRepresentations:
        tokens, f = self._greedy(prompt, steps)
        return ContextRepresentations(index, f, torch.tensor(tokens))

    def _ended(self, tokens: list[int]) -> list[int]:
        """Return tokens up to the first that ends a text."""
        ends = self._at_hand.ends
        return tokens[: next((i + 1 for i, token in enumerate(tokens) if token in ends), len(tokens))]
