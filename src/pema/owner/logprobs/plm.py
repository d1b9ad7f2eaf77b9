"""A PLM of which an API returns log-probabilities only, behind the owner's contract."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property
from typing import Self

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from pema.console import note
from pema.errors import MismatchError, OwnerError
from pema.files import digest
from pema.owner import loading
from pema.owner.bundle import SETTINGS_FILE
from pema.owner.client.connection import Connection
from pema.owner.contract import ContextRepresentations, Contexts, PLMDescription
from pema.owner.head import Head
from pema.owner.llamacpp.probe import LIKELIEST, TOLERANCE, deviation_of
from pema.owner.llamacpp.probe import TEXTS as PROBED
from pema.owner.llamacpp.recovery import enough
from pema.owner.llamacpp.sequential import SequentialPLM
from pema.owner.llamacpp.tokenisation import end_tokens, ordinary_tokens
from pema.owner.logprobs.api import LogProbAPI, ReadsSequences
from pema.owner.logprobs.opening import open_api, read_tokenizer
from pema.owner.logprobs.reading import Reading, require_enough
from pema.owner.sources.served import Served


class LogProbPLM(SequentialPLM):
    """A frozen causal language model behind an API that returns log-probabilities.

    Its head was recovered from them (`recover_head`) or released by its owner; f of each context is the least-squares
    solution of its log-probabilities against the head. Only f is stored.

    Attributes:
        deviation: how much head(f) differs from the API's log-probabilities of the likeliest tokens; not a number until
            it is probed.
    """

    def __init__(self, name: str, head: Head, tokenizer: PreTrainedTokenizerBase, api: LogProbAPI) -> None:
        """Put the parts together; `connect` checks and probes them.

        Args:
            name: name of the PLM.
            head: the recovered or released LM head.
            tokenizer: the PLM's tokenizer.
            api: the API.
        """
        self._name, self._head, self._tokenizer, self._api = name, head, tokenizer, api
        self._ends = end_tokens(tokenizer, [])
        ordinary = ordinary_tokens(tokenizer, self._ends, head.vocabulary_size, enough(head.d))
        self._reading = Reading(api, head, ordinary)
        self.deviation = math.nan

    @classmethod
    def connect(cls, served: Served, connection: Connection | None = None) -> Self:
        """Connect to an API, and probe it.

        Args:
            served: the address, and the folder with the head bundle and the tokenizer's files.
            connection: connection to the API; default: one to the address.

        Raises:
            OwnerError: the folder has no head, or the API does not return what is needed.
            MismatchError: the API has another model or tokenizer.
        """
        url = served.url or ""
        if not (served.model / SETTINGS_FILE).exists():
            raise OwnerError(
                f"{served.model} contains no LM head: recover it with `pema recover {url} --tokenizer {served.model} "
                "-o HEAD`, then give the folder HEAD."
            )
        head = Head.load(served.model)
        if head.norm is not None:
            raise OwnerError(
                f"the head bundle {served.model} begins before the final norm, and log-probabilities show what comes "
                "after it: release it with tap 'head_input'."
            )
        tokenizer = read_tokenizer(served.model)
        api = open_api(url, tokenizer, connection)
        about, V = api.about, head.vocabulary_size
        if (about.vocabulary_size or V) != V:
            raise MismatchError(
                f"{api.where} runs another model than {served.name}: {about.vocabulary_size:,} tokens, expected "
                f"{V:,}. Give the head of the model that runs there."
            )
        require_enough(api, head, served.name)
        plm = cls(served.name, head, tokenizer, api)
        plm.deviation = plm._probe()
        note(
            f"{served.name}: head(f) differs from the log-probabilities of {api.where} by {plm.deviation:.2%} (at most "
            f"{TOLERANCE:.0%} is accepted)."
        )
        return plm

    def _probe(self) -> float:
        """Compare head(f) with the API's log-probabilities, read anew and after a shorter context."""
        prompts = [list(self._tokenizer(text).input_ids) for text in PROBED]
        count = min(LIKELIEST, self._api.most, self._head.vocabulary_size)
        given = self._api.likeliest(prompts, count, cached=False)
        self._reading.last([prompt[:-1] for prompt in prompts], False)
        worst = 0.0
        for cached in (False, True):
            logits = self._head(self._reading.last(prompts, cached)).double().gather(1, given.tokens)
            worst = max(worst, deviation_of(logits, given.values))
        if worst > TOLERANCE:
            raise MismatchError(
                f"{self._api.where} does not fit the LM head of {self._name}: head(f) differs from its "
                f"log-probabilities by {worst:.0%}, at most {TOLERANCE:.0%} is accepted. Give the head of the model "
                "that runs there (llama.cpp: start the server with --swa-full)."
            )
        return worst

    @cached_property
    def description(self) -> PLMDescription:
        """Description of the PLM."""
        about, head = self._api.about, self._head
        tokenizer = loading.tokenizer_fingerprints(self._tokenizer)
        identity = {"engine": about.engine, "model": about.model, "head": head.fingerprint}
        return PLMDescription(
            name=self._name,
            architecture=f"{about.engine} (log-probabilities)",
            fingerprint=digest(identity | {"parameters": about.parameters, "bytes": about.bytes}),
            tokenizer_fingerprint=tokenizer.current,
            head_fingerprint=head.fingerprint,
            d=head.d,
            d_tap=head.d_tap,
            vocabulary_size=head.vocabulary_size,
            tap="head_input",
            # A completion needs a place for the token that follows.
            max_length=(about.context or loading.NO_LIMIT) - 1,
            eos_token_ids=self._ends,
            parameters=about.parameters or 1,
            weights="read from log-probabilities",
            earlier_tokenizers=tokenizer.earlier,
        )

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The PLM's tokenizer."""
        return self._tokenizer

    def head(self) -> Head:
        """Return the head bundle."""
        return self._head

    def forecast(self, contexts: Contexts, lengths: Sequence[int]) -> list[str]:
        """Say what a build takes; see `contract.Metered`."""
        each, positions = self._reading.count, sum(lengths)
        size = positions * each * self._api.entry_bytes / 1e6
        if contexts == "teacher" and isinstance(self._api, ReadsSequences):
            return [
                f"{len(lengths):,} requests, one for each example, for {each:,} log-probabilities of each of "
                f"{positions:,} tokens: {size:,.0f} MB of answers."
            ]
        return [
            f"One request for each token after a prompt, for {each:,} log-probabilities "
            f"({each * self._api.entry_bytes / 1e6:.1f} MB): {positions:,} tokens are the maximum, with all prompts."
        ]

    def _contexts(self, tokens: Sequence[int], start: int) -> Tensor:
        f = self._reading.along(tokens, start)
        return super()._contexts(tokens, start) if f is None else f

    def _last(self, contexts: Sequence[Sequence[int]], cached: bool) -> Tensor:
        return self._reading.last(contexts, cached)

    def _predicted(self, index: int, prompt: Sequence[int], steps: int) -> ContextRepresentations:
        """Follow the greedy text of head(f)."""
        tokens: list[int] = []
        rows: list[Tensor] = []
        while len(tokens) < steps and (not tokens or tokens[-1] not in self._ends):
            rows.append(self._reading.last([[*prompt, *tokens]], bool(tokens)))
            tokens.append(int(self._head(rows[-1]).argmax()))
        return ContextRepresentations(index, torch.cat(rows), torch.tensor(tokens))
