"""A decoding session on a PLM owner's server."""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Sequence

import torch
from torch import Tensor

from pema.errors import DataError, OwnerError
from pema.owner.client.connection import SESSIONS, SMALL_ANSWER, Connection, LostSessionError, any_route
from pema.owner.contract import PLMDescription
from pema.owner.wire import ROUTE, WireDtype, unpack

logger = logging.getLogger(__name__)
_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
"""Valid names of sessions, which become part of a URL."""


OFTEN = 4
"""Replicas in a row that do not know a session which was just opened: its requests do not reach the one that does."""


class RemoteSession:
    """A decoding session on a server; see `contract.Session`.

    If the server has lost the session (it expired, or has gone with a replica of the server), it is opened again with
    the current contexts, so that generation continues with the same text.
    """

    def __init__(
        self, connection: Connection, prompts: Sequence[Sequence[int]], dtype: WireDtype, description: PLMDescription
    ) -> None:
        self._connection, self._dtype, self._description = connection, dtype, description
        self._contexts = [list(prompt) for prompt in prompts]
        self._id: str | None = None
        self._step = 0
        self._unknown = 0  # times in a row that it was lost because a replica did not know it
        self._route = ""
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
        path = f"{SESSIONS}{self._id}/advance"
        rows = range(len(self._contexts)) if parents is None else parents
        try:
            content = self._connection.request("POST", path, body, most=self._most(len(tokens)), route=self._same_route)
        except LostSessionError as error:
            self._require_replica(error)
            logger.warning(
                "A decoding session is lost (%s) and begun again with its %d contexts; the text does not change.",
                error,
                len(tokens),
            )
            contexts = [[*self._contexts[row], token] for row, token in zip(rows, tokens, strict=True)]
            self._contexts = contexts
            self._representations = self._open()
            return
        self._representations = self._read(content, len(tokens))[0]
        self._contexts = [[*self._contexts[row], token] for row, token in zip(rows, tokens, strict=True)]
        self._step += 1
        self._unknown = 0

    def close(self) -> None:
        """Close the session; see `contract.Session.close`. If the server is unreachable, the session expires there."""
        if self._id is not None:
            with contextlib.suppress(OwnerError, DataError):
                self._connection.request("DELETE", f"{SESSIONS}{self._id}", route=self._same_route)
            self._id = None

    def _require_replica(self, error: LostSessionError) -> None:
        """Refuse to go on if the session is lost at every step: each token would cost its whole context."""
        self._unknown = self._unknown + 1 if error.unknown else 0
        if self._unknown == OFTEN:
            raise OwnerError(
                f"the requests of a decoding session do not reach the replica of {self._connection.url} that has it: "
                "ask the PLM's owner to send all requests of a session to one replica, for example by the hash of the "
                f"header {ROUTE}."
            ) from error

    def _open(self) -> Tensor:
        rows = len(self._contexts)
        body = {"prompts": self._contexts, "dtype": self._dtype}
        content = self._connection.request("POST", SESSIONS[:-1], body, most=self._most(rows), route=self._new_route)
        f, texts = self._read(content, rows)
        name = texts.get("session", "")
        if not _NAME.fullmatch(name):
            raise OwnerError(f"{self._connection.url} opened a session without a valid name.")
        self._id, self._step = name, 0
        return f

    def _new_route(self) -> str:
        """Take another route at each try: the replica of a lost session may be gone."""
        self._route = any_route()
        return self._route

    def _same_route(self) -> str:
        return self._route

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
