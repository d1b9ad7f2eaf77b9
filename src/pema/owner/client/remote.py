"""A PLM on a `pema serve` server, behind the owner's contract: the data owner's end of the network."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property
from typing import Any, cast, get_args

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pema.errors import ConfigError, DataError, OwnerError, PemaError
from pema.owner.batching import length_batches
from pema.owner.client.connection import SMALL_ANSWER, Connection
from pema.owner.client.received import TOKENIZER_BYTES, head_bytes, load_head, load_tokenizer
from pema.owner.client.remote_session import RemoteSession
from pema.owner.client.rules import KeyRules
from pema.owner.contract import BATCH_TOKENS, ContextRepresentations, Contexts, PLMDescription, Tap, padded
from pema.owner.decoding import DecodesInSessions
from pema.owner.head import Head
from pema.owner.requests import require_prompts, require_sequences
from pema.owner.wire import VERSION, WireDtype, identity, unpack

IN_FLIGHT = 2
"""Number of concurrent requests: the server processes one while the answer to the other is transmitted."""


class RemotePLM(DecodesInSessions):
    """A frozen causal language model on its owner's server.

    The client sends to the server: prompts, and in `teacher` mode whole sequences; during generation, the chosen
    tokens. In `predicted` mode no target is sent, and the number of requested steps is always rounded up to a multiple
    of `contract.STEP_BUCKET`. Contexts of a mode that the server does not offer to this key are refused here, before
    anything is sent.

    Attributes:
        dtype: precision of representations on the network.
    """

    def __init__(
        self, url: str, *, tap: Tap = "head_input", dtype: WireDtype = "float16", connection: Connection | None = None
    ) -> None:
        if dtype not in get_args(WireDtype):
            raise ConfigError(f"dtype {dtype!r} is not supported on the network: use {', '.join(get_args(WireDtype))}.")
        self.dtype = dtype
        self._connection = connection or Connection(url)
        self._description, self._rules = self._ask_rules()
        self._connection.plm = identity(self._description)
        if self._description.tap != tap:
            raise ConfigError(
                f"{self._connection.url} reads representations at tap {self._description.tap!r}, not at {tap!r}."
            )

    def _ask_rules(self) -> tuple[PLMDescription, KeyRules]:
        """Ask the server for the description of its PLM and the rules of this key."""
        about = self._connection.get("/v1/plm")
        where = self._connection.url
        if not isinstance(about, dict) or about.get("wire") != VERSION:
            spoken = about.get("wire") if isinstance(about, dict) else None
            raise OwnerError(
                f"{where} speaks version {ascii(spoken)[:40]} of the protocol, this is version {VERSION}: use the same "
                "version of pema."
            )
        try:
            return PLMDescription.from_dict(about["description"]), KeyRules.of(about, where)
        except (ValueError, KeyError, TypeError, OverflowError) as error:
            raise OwnerError(f"{where} does not describe its PLM as a pema server does: {str(error)!a}") from error

    @property
    def description(self) -> PLMDescription:
        """Description of the PLM."""
        return self._description

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The PLM's tokenizer.

        Raises:
            OwnerError: the server sent an invalid tokenizer.
            MismatchError: it does not match the description.
        """
        files = self._connection.get("/v1/tokenizer", most=TOKENIZER_BYTES)
        return load_tokenizer(files, self._description, self._connection.url)

    @cached_property
    def _head(self) -> Head:
        content = self._connection.request("GET", "/v1/head", most=head_bytes(self._description))
        tensors, texts = unpack(content)
        return load_head(tensors, texts, self._description, self._connection.url)

    def head(self) -> Head:
        """Download the head bundle from the server, once.

        Raises:
            OwnerError: the owner's policy does not release it, or the server sent an invalid head.
            MismatchError: it does not match the description.
        """
        return self._head

    @cached_property
    def model(self) -> PreTrainedModel:
        """Model of transformers whose `generate` decodes in a session on the server.

        Raises:
            OwnerError: this key may not open sessions.
        """
        self._rules.require_sessions()
        return super().model

    def represent(
        self,
        sequences: Sequence[Sequence[int]],
        starts: Sequence[int],
        *,
        batch_tokens: int = BATCH_TOKENS,
        skip: frozenset[int] = frozenset(),
    ) -> Iterator[ContextRepresentations]:
        """Represent `teacher` contexts; see `contract.PLM.represent`.

        Raises:
            OwnerError: the server does not offer them to this key; no sequence was sent.
        """
        self._rules.require_contexts("teacher")
        require_sequences(sequences, starts, self._description.max_length)

        def body(batch: list[int]) -> dict[str, Any]:
            return {"sequences": [list(sequences[i]) for i in batch], "starts": [starts[i] for i in batch]}

        counts = [len(sequence) - start for sequence, start in zip(sequences, starts, strict=True)]
        yield from self._ask("/v1/represent", body, [len(s) for s in sequences], batch_tokens, counts, counts, skip)

    def predict(
        self,
        prompts: Sequence[Sequence[int]],
        steps: Sequence[int],
        *,
        batch_tokens: int = BATCH_TOKENS,
        skip: frozenset[int] = frozenset(),
    ) -> Iterator[ContextRepresentations]:
        """Represent `predicted` contexts; see `contract.PLM.predict`.

        Raises:
            OwnerError: the server does not offer them to this key; no prompt was sent.
        """
        self._rules.require_contexts("predicted")
        window = self._description.max_length
        require_prompts(prompts, steps, window)
        asked = [min(padded(count), window - len(prompt)) for prompt, count in zip(prompts, steps, strict=True)]

        def body(batch: list[int]) -> dict[str, Any]:
            return {"prompts": [list(prompts[i]) for i in batch], "steps": [asked[i] for i in batch]}

        lengths = [len(prompt) + n for prompt, n in zip(prompts, asked, strict=True)]
        yield from self._ask("/v1/predict", body, lengths, batch_tokens, asked, steps, skip)

    def open_session(self, prompts: Sequence[Sequence[int]]) -> RemoteSession:
        """Open a decoding session; see `contract.PLM.open_session`.

        Raises:
            OwnerError: the server does not let this key open sessions; no prompt was sent.
        """
        self._rules.require_sessions()
        return RemoteSession(self._connection, prompts, self.dtype, self._description)

    def forecast(self, contexts: Contexts, lengths: Sequence[int]) -> list[str]:
        """Check a build against the current rules of this key; see `contract.Metered.forecast`.

        Raises:
            OwnerError: this key can never do it; nothing was sent.
        """
        _, self._rules = self._ask_rules()
        return self._rules.forecast(contexts, lengths)

    def _ask(
        self,
        path: str,
        body: Callable[[list[int]], dict[str, Any]],
        lengths: Sequence[int],
        batch_tokens: int,
        asked: Sequence[int],
        wanted: Sequence[int],
        skip: frozenset[int],
    ) -> Iterator[ContextRepresentations]:
        """Send batches of similar length, a few concurrently, and yield their answers in order.

        Args:
            path: path of the endpoint.
            body: builds the request for a batch of indices.
            lengths: number of tokens of each sequence.
            batch_tokens: maximum tokens per request.
            asked: number of contexts requested for each sequence.
            wanted: number of contexts returned for each; those added by the bucket are dropped.
            skip: sequences that are not yielded.
        """
        tokens, rows = min(batch_tokens, self._rules.request_tokens), self._rules.batch_sequences
        batches = [batch[k : k + rows] for batch in length_batches(lengths, tokens) for k in range(0, len(batch), rows)]
        batches = [batch for batch in batches if not skip.issuperset(batch)]
        row_bytes = self._description.d_tap * getattr(torch, self.dtype).itemsize + 8

        def send(batch: list[int]) -> list[ContextRepresentations]:
            most = row_bytes * sum(asked[i] for i in batch) + 8 * len(batch) + SMALL_ANSWER
            content = self._connection.request("POST", path, body(batch) | {"dtype": self.dtype}, most=most)
            parts = self._answers(content, [asked[i] for i in batch], path)
            # Clones, so that a retained part does not keep the whole answer in memory.
            return [
                ContextRepresentations(i, f[: wanted[i]].clone(), None if words is None else words[: wanted[i]].clone())
                for i, (f, words) in zip(batch, parts, strict=True)
                if i not in skip
            ]

        with ThreadPoolExecutor(IN_FLIGHT, "pema-client") as pool:
            waiting: deque[Future[list[ContextRepresentations]]] = deque()
            try:
                for batch in batches:
                    if len(waiting) == IN_FLIGHT:
                        yield from waiting.popleft().result()
                    waiting.append(pool.submit(send, batch))
                while waiting:
                    yield from waiting.popleft().result()
            except PemaError:
                # The answers to the other requests were paid for: the caller may keep them.
                for future in waiting:
                    with contextlib.suppress(PemaError):
                        yield from future.result()
                raise
            finally:
                for future in waiting:
                    future.cancel()

    def _answers(self, content: bytes, asked: list[int], path: str) -> list[tuple[Tensor, Tensor | None]]:
        """Split an answer into representations and generated tokens per sequence."""
        where = f"{self._connection.url}{path}"
        tensors, _ = unpack(content)
        predicted = path == "/v1/predict"
        names = {"representations", "counts"} | ({"generated"} if predicted else set())
        if set(tensors) != names:
            raise OwnerError(
                f"{where} answered with {ascii(sorted(tensors))[:200]}, expected {', '.join(sorted(names))}."
            )
        f, counts = tensors["representations"], tensors["counts"]
        words = tensors.get("generated")
        fits = counts.dtype == torch.int64 and counts.shape == (len(asked),)
        if fits:
            most = torch.tensor(asked)
            fits = bool(((counts >= 1) & (counts <= most) if predicted else counts == most).all())
        total = int(counts.sum()) if fits else 0
        width = self._description.d_tap
        if not fits or f.shape != (total, width) or f.dtype != getattr(torch, self.dtype):
            raise OwnerError(
                f"{where} answered with representations of shape {tuple(f.shape)} in {f.dtype} for {len(asked)} "
                f"sequences; expected at most {sum(asked)} of width {width} in {self.dtype}."
            )
        if words is not None:
            fits = words.dtype == torch.int64 and words.shape == (total,)
            if not fits or not bool(((words >= 0) & (words < self._description.vocabulary_size)).all()):
                raise OwnerError(f"{where} answered with invalid generated tokens, or not one per representation.")
        if not bool(f.isfinite().all()):
            raise DataError(
                f"{where} sent representations that are not finite in {self.dtype}: request float32 or bfloat16."
            )
        split = cast("list[int]", counts.tolist())
        parts: Sequence[Tensor | None] = [None] * len(asked) if words is None else torch.split(words, split)
        return list(zip(torch.split(f, split), parts, strict=True))
