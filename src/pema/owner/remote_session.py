"""A decoding session on a PLM owner's server."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Sequence

from torch import Tensor

from pema.errors import DataError, OwnerError
from pema.owner.connection import Connection, LostSessionError
from pema.owner.contract import PLMDescription
from pema.owner.wire import WireDtype, unpack

logger = logging.getLogger(__name__)


class RemoteSession:
    """See `contract.Session`.

    A session that the server has lost (it was restarted, or the session expired) is opened again from the contexts as
    they stand, so a generation goes on where it was.
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
        """(rows, d_tap), f of every row's context as it stands, on the CPU."""
        return self._representations

    @property
    def held_bytes(self) -> int:
        """What lies here; the owner's end is not known."""
        return self._representations.nbytes

    def advance(self, tokens: Sequence[int], parents: Sequence[int] | None = None) -> None:
        """See `contract.Session.advance`."""
        if self._id is None:
            raise DataError("the session is closed: open another.")
        body = {"step": self._step + 1, "tokens": list(tokens), "parents": None if parents is None else list(parents)}
        path = f"/v1/sessions/{self._id}/advance"
        rows = range(len(self._contexts)) if parents is None else parents
        try:
            response = self._connection.request("POST", path, body)
        except LostSessionError as error:
            logger.warning("%s Opening it again with %d contexts.", error, len(tokens))
            contexts = [[*self._contexts[row], token] for row, token in zip(rows, tokens, strict=True)]
            self._contexts = contexts
            self._representations = self._open()
            return
        self._representations = self._read(response.content, len(tokens))[0]
        self._contexts = [[*self._contexts[row], token] for row, token in zip(rows, tokens, strict=True)]
        self._step += 1

    def close(self) -> None:
        """See `contract.Session.close`; a server that cannot be told lets the session expire."""
        if self._id is not None:
            with contextlib.suppress(OwnerError, DataError):
                self._connection.request("DELETE", f"/v1/sessions/{self._id}")
            self._id = None

    def _open(self) -> Tensor:
        response = self._connection.request("POST", "/v1/sessions", {"prompts": self._contexts, "dtype": self._dtype})
        found, texts = self._read(response.content, len(self._contexts))
        if "session" not in texts:
            raise OwnerError(f"{self._connection.url} opened a session without saying its name.")
        self._id, self._step = texts["session"], 0
        return found

    def _read(self, content: bytes, rows: int) -> tuple[Tensor, dict[str, str]]:
        tensors, texts = unpack(content)
        found = tensors.get("representations")
        if found is None or tuple(found.shape) != (rows, self._description.d_tap):
            shape = None if found is None else tuple(found.shape)
            raise OwnerError(
                f"{self._connection.url} answered a step with representations of shape {shape}, expected "
                f"({rows}, {self._description.d_tap})."
            )
        return found, texts
