"""A PLM that llama.cpp's server runs, behind the owner's contract."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from pema.console import note
from pema.errors import DataError, MismatchError
from pema.files import digest
from pema.owner import loading
from pema.owner.client.connection import Connection
from pema.owner.contract import ContextRepresentations, PLMDescription
from pema.owner.head import Head
from pema.owner.llamacpp.engine import Engine, Properties, parts
from pema.owner.llamacpp.material import material
from pema.owner.llamacpp.probe import TOLERANCE, probe
from pema.owner.llamacpp.process import Settings, require_installed, start
from pema.owner.llamacpp.sequential import SequentialPLM
from pema.owner.llamacpp.tokenisation import require_same_tokens
from pema.owner.sources.served import Served

PATIENCE = 5.0
"""Seconds that a request to a server in a child process is repeated if it fails in transit."""


class LlamaCppPLM(SequentialPLM):
    """A frozen causal language model that llama.cpp's server runs.

    `teacher` contexts are one request a sequence, for one vector a token. `predicted` contexts are one for each token
    of the engine's greedy text, then one for the vectors of prompt and text. A decoding session recovers f from
    log-probabilities (`Recovery`), because only completions use the state that the engine keeps; a server that gives no
    vectors, or none for so long a sequence, is asked for all contexts in this way.

    Attributes:
        deviation: how much head(f) differs from the engine's own log-probabilities; see `probe`.
    """

    def __init__(self, served: Served, connection: Connection | None = None) -> None:
        """Start the server, or connect to the running one, and probe it.

        Args:
            served: the model and where it runs.
            connection: connection to the running server; default: one to its address.

        Raises:
            OwnerError: it cannot be started or reached, or does not give what is needed.
            MismatchError: it runs another model than the one at hand, or returns other vectors than its head reads.
        """
        if served.url is None:
            require_installed()
            self._at_hand = at_hand = material(served)
            settings = Settings.of(served.model, at_hand.max_length, at_hand.heads[0].vocabulary_size)
            server = start(settings)
            self._end = weakref.finalize(self, server.stop)
            self._where = "llama.cpp's server"
            self._engine = Engine(Connection(server.url, key=server.key, patience=PATIENCE), server.ended)
            self._properties = self._engine.properties()
        else:
            # The server comes first: reading a file takes longer than finding that none answers.
            self._where = served.url
            self._engine = Engine(connection or Connection(served.url))
            self._properties = self._engine.properties()
            self._at_hand = at_hand = material(served)
        self._require_same_model(self._properties)
        require_same_tokens(self._engine, at_hand.tokenizer, self._where)
        self._probed = probe(self._engine, at_hand, self._where)
        self._longest = 0 if not self._probed.vectors else self.description.max_length
        (self._drawn,) = at_hand.ordinary_tokens(1)
        self.deviation = self._probed.deviation
        note(
            f"{at_hand.name}: head(f) differs from the engine's own log-probabilities by {self.deviation:.2%} (at most "
            f"{TOLERANCE:.0%} is accepted)."
        )

    def _require_same_model(self, theirs: Properties) -> None:
        head, at_hand = self._at_hand.heads[0], self._at_hand
        for noun, running, own in (
            ("tokens", theirs.vocabulary_size, head.vocabulary_size),
            ("numbers in a representation", theirs.d, head.d),
            ("weights", theirs.parameters, at_hand.parameters),
            ("bytes of weights", theirs.bytes, at_hand.bytes),
        ):
            if running is not None and own is not None and running != own:
                raise MismatchError(
                    f"{self._where} runs another model than {at_hand.name}: {running:,} {noun}, expected {own:,}. Give "
                    "the file that the engine runs."
                )

    @cached_property
    def description(self) -> PLMDescription:
        """Description of the PLM."""
        at_hand, head = self._at_hand, self._probed.head
        tokenizer = loading.tokenizer_fingerprints(at_hand.tokenizer)
        theirs = self._properties
        identity = at_hand.fingerprint or digest(
            {"engine": "llama.cpp", "head": head.fingerprint, "parameters": theirs.parameters, "bytes": theirs.bytes}
        )
        return PLMDescription(
            name=at_hand.name,
            architecture=at_hand.architecture,
            fingerprint=identity,
            tokenizer_fingerprint=tokenizer.current,
            head_fingerprint=head.fingerprint,
            d=head.d,
            d_tap=head.d_tap,
            vocabulary_size=head.vocabulary_size,
            tap="head_input",
            # A completion needs a place for the token that follows.
            max_length=min(at_hand.max_length, theirs.context - 1),
            eos_token_ids=at_hand.ends,
            parameters=theirs.parameters or at_hand.parameters or 1,
            weights=at_hand.weights,
            earlier_tokenizers=tokenizer.earlier,
        )

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The PLM's tokenizer."""
        return self._at_hand.tokenizer

    def head(self) -> Head:
        """Return the head bundle."""
        return self._probed.head

    def _predicted(self, index: int, prompt: Sequence[int], steps: int) -> ContextRepresentations:
        tokens: list[int] = []
        while len(tokens) < steps and (not tokens or tokens[-1] not in self.description.eos_token_ids):
            # Token by token: the engine ends a text, or refuses it, where the PLM goes on.
            (token,), _ = self._engine.likeliest([*prompt, *tokens], 1, self._drawn, cached=bool(tokens))
            tokens.append(token)
        f = self._contexts([*prompt, *tokens[:-1]], len(prompt))
        return ContextRepresentations(index, f, torch.tensor(tokens))

    def _contexts(self, tokens: Sequence[int], start: int) -> Tensor:
        """Request the vectors of all tokens at once, if the engine gives these."""
        if len(tokens) <= self._longest:
            vectors = self._engine.vectors(tokens, self._probed.head.d)
            if vectors is not None and len(vectors) == len(tokens):
                return vectors[start - 1 :].clone()
            self._longest = len(tokens) - 1
            note(
                f"{self._where} gives no vectors for {len(tokens):,} tokens at once, which --ubatch-size allows: "
                "longer sequences are read token by token."
            )
        return super()._contexts(tokens, start)

    def _last(self, contexts: Sequence[Sequence[int]], cached: bool) -> Tensor:
        """Return f of each context, (rows, d)."""
        recovery = self._probed.recovery
        if recovery is not None:
            # The contexts of a request are in the engine's memory at the same time.
            divided = parts(contexts, self._properties.context)
            return torch.cat([recovery(self._engine.chosen(part, recovery.tokens, cached=cached)) for part in divided])
        rows = []
        for context in contexts:
            vectors = self._engine.vectors(context, self._probed.head.d)
            if vectors is None or len(vectors) != len(context):
                raise DataError(
                    f"{self._where} gives no vectors for a context of {len(context):,} tokens: start it with a larger "
                    "--ubatch-size, or shorten the text."
                )
            rows.append(vectors[-1])
        return torch.stack(rows)
