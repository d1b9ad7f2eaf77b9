"""A PLM of two parts: an API that gives the likeliest tokens, and a small open PLM that gives representations."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, NoReturn

from pema.errors import MismatchError, OwnerError
from pema.files import digest
from pema.owner import loading
from pema.owner.contract import BATCH_TOKENS, BESIDE_API, PLM, ContextRepresentations, PLMDescription, Proposal
from pema.owner.head import Head
from pema.owner.openai_api.answers import Answer, Named
from pema.owner.openai_api.client import Client
from pema.owner.openai_api.config import APIConfig
from pema.owner.openai_api.following import TextFollower
from pema.owner.openai_api.head import head_over
from pema.owner.openai_api.reading import Reading
from pema.owner.openai_api.vocabulary import Vocabulary
from pema.owner.requests import require_sequences
from pema.schema import short
from pema.tasks.example import Turn

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

COUNTED = 8
"""Number of first answers whose prompt is counted by the tokenizer and by the API."""

SPREAD = (4, 0.05)
"""How much more tokens the API may write around one prompt than around another: a number, and a share of the prompt."""

CLOSE = 0.5
"""Largest difference of a log-probability between a text that an API wrote and the same text that it continues."""


class ProxyPLM:
    """An API's model for the mixture, with the representations of a proxy.

    Contexts are sequences of the API's tokens. f of a context is the proxy's representation of its text (`Reading`), so
    a memory is built without a request to the API; its LM head is the proxy's, over the API's tokens (`head_over`).
    The API is asked in generation only, for its likeliest tokens (`propose`).

    Attributes:
        block: number of tokens to request at once.
        parallel: number of requests that may be sent at the same time.
    """

    def __init__(self, config: APIConfig, proxy: PLM) -> None:
        """Load the API's tokenizer and open its file of answers; nothing is requested.

        Raises:
            OwnerError: the tokenizer cannot be loaded.
            ConfigError: the openai library is missing, or the address would send prompts unencrypted.
            StorageError: the file of the answers cannot be used.
        """
        self._config, self._proxy, self._client = config, proxy, Client(config)
        self._vocabulary = Vocabulary.load(config.tokenizer, config.endpoint)
        self._reading = Reading(proxy, self._vocabulary)
        self.block, self.parallel = config.block, config.parallel
        self._overheads: list[tuple[int, int]] = []
        self._continues: bool | None = True if config.endpoint == "completions" else None
        self._lock, self._counts = threading.Lock(), threading.Lock()

    @cached_property
    def description(self) -> PLMDescription:
        """Description of the API's tokens and the proxy: the model itself may change without a new memory."""
        tokenizer, proxy = loading.tokenizer_fingerprint(self.tokenizer), self._proxy.description
        head = self.head()
        made_of = {"endpoint": self._config.endpoint, "tokenizer": tokenizer, "proxy": proxy.fingerprint}
        return PLMDescription(
            name=f"{self._config.model} by proxy {proxy.name}",
            architecture=f"{BESIDE_API}{proxy.architecture}",
            fingerprint=digest(made_of),
            tokenizer_fingerprint=tokenizer,
            head_fingerprint=head.fingerprint,
            d=head.d,
            d_tap=head.d_tap,
            vocabulary_size=head.vocabulary_size,
            tap=proxy.tap,
            max_length=proxy.max_length,
            eos_token_ids=self._vocabulary.ends,
            parameters=proxy.parameters,
            weights=proxy.weights,
        )

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The API's tokenizer."""
        return self._vocabulary.tokenizer

    @property
    def model(self) -> PreTrainedModel:
        """Refused: an API has no model whose `generate` could be used.

        Raises:
            OwnerError: always.
        """
        self._refuse("has no model for the `generate` of transformers")

    @property
    def generator(self) -> PreTrainedModel:
        """Refused as `model`.

        Raises:
            OwnerError: always.
        """
        return self.model

    @property
    def proposer(self) -> ProxyPLM:
        """The side that gives proposals."""
        return self

    @cached_property
    def _head(self) -> Head:
        return head_over(self._vocabulary, self._proxy, loading.tokenizer_fingerprint(self.tokenizer))

    def head(self) -> Head:
        """Return the proxy's LM head over the API's tokens."""
        return self._head

    def represent(
        self,
        sequences: Sequence[Sequence[int]],
        starts: Sequence[int],
        *,
        batch_tokens: int = BATCH_TOKENS,
        skip: frozenset[int] = frozenset(),
    ) -> Iterator[ContextRepresentations]:
        """Represent `teacher` contexts; see `pema.owner.contract.PLM.represent`."""
        require_sequences(sequences, starts, self.description.max_length)
        return self._reading.represent(sequences, starts, batch_tokens, skip)

    def predict(
        self,
        prompts: Sequence[Sequence[int]],
        steps: Sequence[int],
        *,
        batch_tokens: int = BATCH_TOKENS,
        skip: frozenset[int] = frozenset(),
    ) -> Iterator[ContextRepresentations]:
        """Refuse `predicted` contexts, which the API would have to write at a price.

        Raises:
            OwnerError: always.
        """
        self._refuse("would be paid for the texts of `predicted` contexts: use contexts='teacher', which it never sees")

    def open_session(self, prompts: Sequence[Sequence[int]]) -> NoReturn:
        """Refuse a decoding session.

        Raises:
            OwnerError: always.
        """
        self._refuse("opens no decoding session")

    def propose(self, prompt: Sequence[int], written: Sequence[int], count: int) -> Proposal:
        """Request the likeliest continuation of a text; see `pema.owner.contract.Proposer.propose`.

        Where the API ends a text without a distribution, the proposal gives the end all of its probability. After a
        part of a character, which cannot be sent, it is asked for the whole character, and a proposal with another one
        is empty. Tokens that an API gives together, as llama.cpp those of a character, have one distribution: that of
        the last.
        """
        asked = self._vocabulary.prompt(prompt)
        with self._lock:
            if self._continues is None and written:
                self._require_continuation(prompt, asked)
        border = self._vocabulary.last_border(written)
        begun, half = written[:border], tuple(written[border:])
        answer = self._ask(prompt, asked, begun, count + len(half))
        tokens: list[int] = []
        top: list[tuple[tuple[int, float], ...]] = []
        for position in answer.positions:
            tokens += self._found(position.token)
            known = [(self._vocabulary.find(token), log_p) for token, log_p in position.top]
            top += [()] * (len(tokens) - len(top) - 1)
            top.append(tuple((token, log_p) for token, log_p in known if token is not None))
            if tokens[-1] in self._vocabulary.ends:
                break
        if answer.ended and not (tokens and tokens[-1] in self._vocabulary.ends):
            tokens.append(self._vocabulary.end)
            top.append(((self._vocabulary.end, 0.0),))
        if not tokens and not answer.completion_tokens:
            raise OwnerError(f"{self._client.where} answered with nothing, and did not say that its text ended.")
        if tuple(tokens[: len(half)]) != half:
            return Proposal((), ())
        return Proposal(tuple(tokens[len(half) :]), tuple(top[len(half) :]))

    def follow(self, prompts: Sequence[Sequence[int]]) -> TextFollower:
        """Follow texts with sessions of the proxy; see `pema.owner.contract.Proposer.follow`."""
        return TextFollower(self._proxy, self._reading, prompts)

    def account(self) -> Callable[[int], str]:
        """Begin an account; see `pema.owner.contract.Proposer.account`."""
        before, repeated = self._client.spending, self._client.repeated

        def account(tokens: int) -> str:
            spent = self._client.spending - before
            again = self._client.repeated - repeated
            asked = (spent.requests + again) / max(tokens, 1)
            kept = f", and {again:,} that were answered before" if again else ""
            return f"{self._client.where}: {spent}{kept}; {asked:.2f} requests a token."

        return account

    def _ask(self, prompt: Sequence[int], asked: str | tuple[Turn, ...], written: Sequence[int], count: int) -> Answer:
        answer = self._client.ask(asked, self._vocabulary.text(written), count, len(prompt) + len(written))
        if answer.prompt_tokens is not None and not written:
            self._require_same_counts(len(prompt), answer.prompt_tokens)
        return answer

    def _require_same_counts(self, own: int, theirs: int) -> None:
        """Refuse an API that counts other tokens: what it writes around a prompt is the same for all prompts."""
        with self._counts:
            if len(self._overheads) == COUNTED:
                return
            self._overheads.append((own, theirs))
            most, share = SPREAD
            around = [theirs - own for own, theirs in self._overheads]
            longest = max(own for own, _ in self._overheads)
            if max(around) - min(around) > most + share * longest:
                raise MismatchError(
                    f"{self._client.where} has another tokenizer than {self._config.tokenizer}: of its first prompts "
                    f"it counts {', '.join(str(theirs) for _, theirs in self._overheads)} tokens, the tokenizer "
                    f"{', '.join(str(own) for own, _ in self._overheads)}. Name the model's own tokenizer."
                )

    def _found(self, token: Named) -> list[int]:
        numbers = self._vocabulary.split(token)
        if not numbers:
            raise MismatchError(
                f"{self._client.where} wrote the token {short(token.name)}, which the tokenizer "
                f"{self._config.tokenizer} does not have: name the model's own tokenizer."
            )
        return numbers

    def _require_continuation(self, prompt: Sequence[int], asked: str | tuple[Turn, ...]) -> None:
        """Refuse a chat API that begins another turn after a reply that was begun.

        What it wrote after a prompt is given back to it in part, and must be continued in the same way.
        """
        whole = self._ask(prompt, asked, (), max(self.block, 4))
        half = len(whole.positions) // 2
        if not half:
            return
        begun = tuple(token for position in whole.positions[:half] for token in self._found(position.token))
        if any(token in self._vocabulary.ends for token in begun):
            return
        rest = self._ask(prompt, asked, begun, 1)
        expected, log_p = whole.positions[half].top[0]
        same = {token: p for each in rest.positions[:1] for token, p in each.top}
        if abs(same.get(expected, float("-inf")) - log_p) > CLOSE:
            text = self._vocabulary.text(begun)
            raise OwnerError(
                f"{self._client.where} does not continue a reply that was begun: after {short(text)} it wrote "
                f"{short(expected.name)}, and with these words as a reply of its own it begins another one. Use "
                "endpoint='completions', or give the fields that its server needs in `continuing` (for vLLM "
                "continue_final_message=true and add_generation_prompt=false)."
            )
        self._continues = True

    def _refuse(self, what: str) -> NoReturn:
        raise OwnerError(
            f"{self._config.model} is an API that gives its {self._config.top_logprobs} likeliest tokens only, and "
            f"{what}. What it can do is in docs/owners.md: build, train, generate and tune."
        )
