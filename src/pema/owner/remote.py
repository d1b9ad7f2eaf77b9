"""A PLM behind `pema serve`, behind the owner's contract: the data owner's end of the network."""

from __future__ import annotations

import json
import tempfile
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any, cast, get_args

import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from pema.errors import ConfigError, DataError, MismatchError, OwnerError
from pema.owner.batching import length_batches
from pema.owner.connection import Connection
from pema.owner.contract import PLMDescription, Represented, Tap, padded
from pema.owner.head import Head
from pema.owner.loading import tokenizer_fingerprint
from pema.owner.remote_session import RemoteSession
from pema.owner.session_model import SessionModel
from pema.owner.wire import VERSION, WireDtype, unpack

IN_FLIGHT = 2
"""Requests under way at once: the server works on one while the answer to the other is on its way."""


class RemotePLM:
    """A frozen causal language model on its owner's server.

    What crosses to the server: prompts, and in `teacher` mode whole sequences; while generating, the chosen tokens. In
    `predicted` mode no target crosses, and the number of steps asked for is rounded up to the server's bucket.

    Attributes:
        dtype: precision of the representations that cross.
    """

    def __init__(
        self, url: str, *, tap: Tap = "head_input", dtype: WireDtype = "float16", connection: Connection | None = None
    ) -> None:
        if dtype not in get_args(WireDtype):
            raise ConfigError(f"dtype {dtype!r} cannot cross: use {', '.join(get_args(WireDtype))}.")
        self.dtype = dtype
        self._connection = connection or Connection(url)
        self._about = self._connection.get("/v1/plm")
        where = self._connection.url
        if not isinstance(self._about, dict) or self._about.get("wire") != VERSION:
            found = self._about.get("wire") if isinstance(self._about, dict) else None
            raise OwnerError(
                f"{where} speaks version {found} of the protocol, this is version {VERSION}: use the same pema."
            )
        self._description = PLMDescription.from_dict(self._about["description"])
        self._limits: dict[str, int] = self._about["limits"]
        if self._description.tap != tap:
            raise ConfigError(f"{where} reads representations at tap {self._description.tap!r}, not at {tap!r}.")

    @property
    def description(self) -> PLMDescription:
        """What the PLM says of itself."""
        return self._description

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The PLM's tokenizer.

        Raises:
            MismatchError: what the server sent is not the tokenizer that it describes.
        """
        files = self._connection.get("/v1/tokenizer")["files"]
        with tempfile.TemporaryDirectory(prefix="pema-tokenizer-") as folder:
            for name, text in files.items():
                if Path(name).name != name:
                    raise OwnerError(f"{self._connection.url} sent a tokenizer file of the name {name!r}: refused.")
                (Path(folder) / name).write_text(text, encoding="utf-8")
            tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        if tokenizer_fingerprint(tokenizer) != self._description.tokenizer_fingerprint:
            raise MismatchError(f"{self._connection.url} sent another tokenizer than the one that it describes.")
        return tokenizer

    @cached_property
    def _head(self) -> Head:
        tensors, texts = unpack(self._connection.request("GET", "/v1/head").content)
        # A masked head's fingerprint is the owner's word: it cannot be computed from the tensors.
        head = Head.of(tensors, json.loads(texts["settings"]), texts["fingerprint"])
        if head.fingerprint != self._description.head_fingerprint:
            raise MismatchError(f"{self._connection.url} sent another LM head than the one that it describes.")
        return head

    def head(self) -> Head:
        """The head bundle that the owner hands out.

        Raises:
            OwnerError: the owner's policy keeps it.
            MismatchError: what the server sent is not the head that it describes.
        """
        return self._head

    @cached_property
    def model(self) -> PreTrainedModel:
        """A transformers model whose `generate` decodes in a session on the server."""
        return SessionModel(self)

    def represent(
        self, sequences: Sequence[Sequence[int]], starts: Sequence[int], *, batch_tokens: int = 8192
    ) -> Iterator[Represented]:
        """`teacher` contexts; see `contract.PLM.represent`."""

        def body(batch: list[int]) -> dict[str, Any]:
            return {"sequences": [list(sequences[i]) for i in batch], "starts": [starts[i] for i in batch]}

        def counts(i: int) -> int:
            return len(sequences[i]) - starts[i]

        yield from self._ask("/v1/represent", body, [len(s) for s in sequences], batch_tokens, counts)

    def predict(
        self, prompts: Sequence[Sequence[int]], steps: Sequence[int], *, batch_tokens: int = 8192
    ) -> Iterator[Represented]:
        """`predicted` contexts; see `contract.PLM.predict`."""
        bucket = self._limits["predict_bucket"]
        rooms = [self._description.max_length - len(prompt) for prompt in prompts]
        asked = [n if n > room else min(padded(n, bucket), room) for n, room in zip(steps, rooms, strict=True)]

        def body(batch: list[int]) -> dict[str, Any]:
            return {"prompts": [list(prompts[i]) for i in batch], "steps": [asked[i] for i in batch]}

        def counts(i: int) -> int:
            return steps[i]

        lengths = [len(prompt) + n for prompt, n in zip(prompts, asked, strict=True)]
        yield from self._ask("/v1/predict", body, lengths, batch_tokens, counts)

    def open_session(self, prompts: Sequence[Sequence[int]]) -> RemoteSession:
        """See `contract.PLM.open_session`."""
        return RemoteSession(self._connection, prompts, self.dtype, self._description)

    def _ask(
        self,
        path: str,
        body: Callable[[list[int]], dict[str, Any]],
        lengths: Sequence[int],
        batch_tokens: int,
        most: Callable[[int], int],
    ) -> Iterator[Represented]:
        """Send batches of nearly equal length, a few at a time, and yield their answers in turn."""
        tokens = min(batch_tokens, self._limits["batch_tokens"])
        rows = self._limits["batch_sequences"]
        batches = [batch[k : k + rows] for batch in length_batches(lengths, tokens) for k in range(0, len(batch), rows)]

        def send(batch: list[int]) -> list[Represented]:
            response = self._connection.request("POST", path, body(batch) | {"dtype": self.dtype})
            return self._answers(response.content, batch, most, path)

        with ThreadPoolExecutor(IN_FLIGHT, "pema-client") as pool:
            waiting: deque[Future[list[Represented]]] = deque()
            try:
                for batch in batches:
                    if len(waiting) == IN_FLIGHT:
                        yield from waiting.popleft().result()
                    waiting.append(pool.submit(send, batch))
                while waiting:
                    yield from waiting.popleft().result()
            finally:
                for future in waiting:
                    future.cancel()

    def _answers(self, content: bytes, batch: list[int], most: Callable[[int], int], path: str) -> list[Represented]:
        where = f"{self._connection.url}{path}"
        tensors, _ = unpack(content)
        try:
            f, counts = tensors["representations"], cast("list[int]", tensors["counts"].tolist())
            parts = torch.split(f, counts)
            words: Sequence[Tensor | None] = [None] * len(batch)
            if "generated" in tensors:
                words = torch.split(tensors["generated"], counts)
        except (KeyError, RuntimeError) as error:
            raise OwnerError(f"{where} answered with tensors that do not fit together: {error}.") from error
        if len(counts) != len(batch) or f.ndim != 2 or f.shape[1] != self._description.d_tap:
            raise OwnerError(
                f"{where} answered {len(counts)} sequences of shape {tuple(f.shape)}, asked were {len(batch)} of width "
                f"{self._description.d_tap}."
            )
        if not bool(f.isfinite().all()):
            raise DataError(
                f"{where} sent representations that are not finite in {self.dtype}: ask for float32 or bfloat16."
            )
        # What the bucket has added to the steps is cut off again.
        return [
            Represented(i, part[: most(i)].clone(), None if word is None else word[: most(i)].clone())
            for i, part, word in zip(batch, parts, words, strict=True)
        ]
