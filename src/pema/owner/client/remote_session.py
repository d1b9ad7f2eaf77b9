"""A decoding session on a PLM owner's server."""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Sequence

import torch
from torch import Tensor

from pema.errors import DataError, OwnerError
from pema.owner.client.connection import SMALL_ANSWER, Connection, LostSessionError
from pema.owner.contract import PLMDescription
from pema.owner.wire import WireDtype, unpack

logger = logging.getLogger(__name__)
_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
"""Valid names of sessions, which become part of a URL."""


class RemoteSession:
    """A decoding session on a server; see `contract.Session`.

    If the server has lost the session (after a restart, or because it expired), it is opened again with the current
    contexts, so that generation continues.
    """

    def __init__(
        self, connection: Connection, prompts: Sequence[Sequence[int]], dtype: WireDtype, description: PLMDescription
    ) -> None:
        self._connection, self._dtype, self._description = connection, dtype, description
        self._contexts = [list(prompt) for prompt in prompts]
        self._id: str | None = None
        self._step = 0
        self._representations = self._open()

    @property
    def representations(self) -> Tensor:
        """(rows, d_tap), f of every row's current context, on the CPU."""
        return self._representations

    @property
    def held_bytes(self) -> int:
        """Bytes kept on this side; those of the owner are unknown."""
        return self._representations.nbytes

    def advance(self, tokens: Sequence[int], parents: Sequence[int] | None = None) -> None:
        """Advance the session; see `contract.Session.advance`."""
        if self._id is None:
            raise DataError("the session is closed: open another.")
        body = {"step": self._step + 1, "tokens": list(tokens), "parents": None if parents is None else list(parents)}
        path = f"/v1/sessions/{self._id}/advance"
        rows = range(len(self._contexts)) if parents is None else parents
        try:
            content = self._connection.request("POST", path, body, most=self._most(len(tokens)))
        except LostSessionError as error:
            logger.warning("%s Opening it again with %d contexts.", error, len(tokens))
            contexts = [[*self._contexts[row], token] for row, token in zip(rows, tokens, strict=True)]
            self._contexts = contexts
            self._representations = self._open()
            return
        self._representations = self._read(content, len(tokens))[0]
        self._contexts = [[*self._contexts[row], token] for row, token in zip(rows, tokens, strict=True)]
        self._step += 1

    def close(self) -> None:
        """Close the session; see `contract.Session.close`. If the server is unreachable, the session expires there."""
        if self._id is not None:
            with contextlib.suppress(OwnerError, DataError):
                self._connection.request("DELETE", f"/v1/sessions/{self._id}")
            self._id = None

    def _open(self) -> Tensor:
        rows = len(self._contexts)
        body = {"prompts": self._contexts, "dtype": self._dtype}
        f, texts = self._read(self._connection.request("POST", "/v1/sessions", body, most=self._most(rows)), rows)
        name = texts.get("session", "")
        if not _NAME.fullmatch(name):
            raise OwnerError(f"{self._connection.url} opened a session without a valid name.")
        self._id, self._step = name, 0
        return f

    def _most(self, rows: int) -> int:
        return 4 * rows * self._description.d_tap + SMALL_ANSWER

    def _read(self, content: bytes, rows: int) -> tuple[Tensor, dict[str, str]]:
        tensors, texts = unpack(content)
        f, where = tensors.get("representations"), self._connection.url
        shape, dtype = (rows, self._description.d_tap), getattr(torch, self._dtype)
        if f is None or len(tensors) != 1 or f.shape != shape or f.dtype != dtype:
            answered = None if f is None else f"{tuple(f.shape)} in {f.dtype}"
            raise OwnerError(
                f"{where} answered a step with representations of shape {answered}, expected {shape} in {dtype}."
            )
        if not bool(f.isfinite().all()):
            raise DataError(f"{where} sent representations that are not finite in {self._dtype}: request float32.")
        return f, texts
