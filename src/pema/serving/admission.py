"""Admission of requests: who sends them, and what they may do."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Coroutine, Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar

from fastapi import Depends
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from starlette.requests import Request

from pema.errors import DataError
from pema.owner.contract import PLM, Contexts
from pema.owner.mask import MaskedPLM
from pema.owner.wire import IDENTITY
from pema.serving import bodies
from pema.serving.accounts import Account
from pema.serving.batcher import Sequences
from pema.serving.keys import identify
from pema.serving.messages import Message
from pema.serving.policy import ANYBODY, Endpoint, Key
from pema.serving.record import RECORD, Record
from pema.serving.refusal import Refusal
from pema.serving.service import Service

M = TypeVar("M", bound=Message)

_bearer = HTTPBearer(auto_error=False, description="An API key of the server's policy.")
Bearer = Annotated[HTTPAuthorizationCredentials | None, Depends(_bearer)]


@dataclass(frozen=True)
class Caller:
    """A request that was admitted.

    Attributes:
        service: the service that it may use.
        account: the account of its key, as of its admission.
        record: what is noted of it.
    """

    service: Service
    account: Account
    record: Record

    @property
    def key(self) -> Key:
        """The rules of its key."""
        return self.account.key

    @property
    def plm(self) -> PLM:
        """The PLM as this key sees it."""
        return self.account.plm

    @property
    def current(self) -> bool:
        """Whether its key still sees the PLM as it did when the request was admitted."""
        account = self.service.accounts.get(self.key.name)
        return account is not None and account.plm is self.plm

    def sequences(
        self, kind: Literal["represent", "predict"], sequences: Sequence[Sequence[int]], numbers: Sequence[int]
    ) -> Sequences:
        """Return the work of a request for contexts, whose answers this key sees through its mask."""
        mask = self.plm if isinstance(self.plm, MaskedPLM) else None
        return Sequences(self.service.plm, kind, sequences, numbers, mask)

    async def read(self, request: Request, model: type[M]) -> M:
        """Read the body of the request; see `bodies.read`."""
        return await bodies.read(request, model, self.service.policy.limits, self.account.pending)

    @contextlib.contextmanager
    def spending(self, tokens: int, sequences: int, representations: int) -> Iterator[None]:
        """Charge the request to the key's quota, and count its answer as pending until it is read.

        A request that is refused inside the block, or fails by no fault of the client, is not charged.

        Args:
            tokens: number of requested tokens.
            sequences: number of rows.
            representations: maximum number of representations in the answer.

        Raises:
            Refusal: the quota is spent, or the key has too many unread answers.
        """
        self.record.sequences = sequences
        answer = representations * self.service.representation_bytes
        self.record.ends.append(self.account.pending.take(answer))
        refund = self.account.quota.tokens(tokens)
        self.record.tokens = tokens
        try:
            yield
        except DataError:
            # The PLM ran, and its answer does not fit the requested precision: that is the client's choice.
            raise
        except BaseException:
            refund()
            self.record.tokens = 0
            raise

    def require_tap(self) -> None:
        """Refuse a key that may not have the representations of this server's tap.

        Raises:
            Refusal: 403.
        """
        tap = self.plm.description.tap
        if tap not in self.key.taps:
            raise _forbidden(f"This server's tap is {tap}, which this key may not use.")

    def require_contexts(self, mode: Contexts) -> None:
        """Refuse a key that may not have contexts of this mode.

        Raises:
            Refusal: 403.
        """
        if mode not in self.key.contexts:
            raise _forbidden(f"This key may not have {mode} contexts.")


def admit(endpoint: Endpoint, *, counted: bool = True) -> Callable[..., Coroutine[Any, Any, Caller]]:
    """Return a dependency that admits requests to an endpoint.

    Args:
        endpoint: name of the endpoint.
        counted: whether the request counts against the key's rate.
    """

    async def admitted(request: Request, credentials: Bearer) -> Caller:
        record: Record = request.scope[RECORD]
        record.endpoint = endpoint
        service: Service = request.app.state.lifecycle.service()
        keys = service.policy.keys
        key = identify(credentials.credentials if credentials else "", keys) if keys else ANYBODY
        if key is None:
            raise Refusal(
                401,
                "unknown_key",
                "The request has no API key, or an unknown one.",
                "Send a key of the PLM owner as `Authorization: Bearer KEY`.",
            )
        account = service.accounts[key.name]
        record.key = key.name
        if endpoint not in key.endpoints:
            raise _forbidden(f"This key may not use {endpoint}.")
        if counted:
            account.quota.request()
        expected = request.headers.get(IDENTITY)
        if expected is not None and expected != account.identity:
            raise Refusal(
                412,
                "another_plm",
                "This server has another PLM than the one that the request is for, or this key sees it otherwise now.",
                "Ask GET /v1/plm, and begin again with this PLM.",
            )
        return Caller(service, account, record)

    return admitted


def _forbidden(message: str) -> Refusal:
    return Refusal(403, "not_allowed", message, "Ask the PLM owner for a key that may.")
