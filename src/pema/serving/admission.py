"""Who calls, and what they may do: the door of every endpoint."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar

from fastapi import Depends
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from pydantic import ValidationError
from starlette.requests import ClientDisconnect, Request

from pema.owner.contract import PLM, Contexts
from pema.serving.gate import RECORD, Record
from pema.serving.keys import identify
from pema.serving.messages import Message
from pema.serving.policy import ANYBODY, Endpoint, Key
from pema.serving.refusal import Refusal
from pema.serving.service import Service

M = TypeVar("M", bound=Message)
BODY_SECONDS = 30.0
"""How long a request's body may take to arrive."""

_bearer = HTTPBearer(auto_error=False, description="An API key of the server's policy.")
Bearer = Annotated[HTTPAuthorizationCredentials | None, Depends(_bearer)]


@dataclass(frozen=True)
class Caller:
    """A request that was let in.

    Attributes:
        service: what it may use.
        key: whose it is.
        record: what is noted of it.
    """

    service: Service
    key: Key
    record: Record

    @property
    def plm(self) -> PLM:
        """The PLM as this key sees it."""
        return self.service.plms[self.key.head]

    def spend(self, tokens: int, sequences: int) -> None:
        """Note what the request asks for, and count it against the key's quota.

        Raises:
            Refusal: the quota is spent.
        """
        self.record.sequences = sequences
        self.service.quotas[self.key.name].tokens(tokens)
        self.record.tokens = tokens

    def require_tap(self) -> None:
        """Refuse a key that may not have the representations of this server's tap.

        Raises:
            Refusal: 403.
        """
        tap = self.service.description(self.key).tap
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
    """A dependency that lets a request into an endpoint.

    Args:
        endpoint: which.
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
                "The request carries no API key that is known here.",
                "Send one as `Authorization: Bearer KEY`; the PLM owner gives them out.",
            )
        record.key = key.name
        if endpoint not in key.endpoints:
            raise _forbidden(f"This key is not let into {endpoint}.")
        if counted:
            service.quotas[key.name].request()
        return Caller(service, key, record)

    return admitted


async def read(request: Request, model: type[M], most: int) -> M:
    """The body of a request, refused before it is read to its end where it is too large.

    Raises:
        Refusal: 415, it is not JSON by its content type; 413, it is too large; 408, it comes too slowly; 422, it is not
            what the endpoint takes.
    """
    content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if content_type != "application/json":
        # A web page may send any other type to a server on the loopback without asking it first.
        raise Refusal(415, "not_json", "The body is not sent as application/json.", "Set Content-Type.")
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared) > most:
        raise _too_large(most)
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for chunk in request.stream():
                body += chunk
                if len(body) > most:
                    raise _too_large(most)
    except TimeoutError:
        raise Refusal(408, "slow_body", f"The body took over {BODY_SECONDS:g} seconds.", "Send it again.") from None
    except ClientDisconnect:
        raise Refusal(400, "disconnected", "The client left.", "Send the request again.") from None
    try:
        return model.model_validate_json(bytes(body))
    except ValidationError as error:
        raise _malformed(error) from None


def _malformed(error: ValidationError) -> Refusal:
    # The input itself, which an error of pydantic holds too, stays out of the answer.
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    unknown = first["type"] == "extra_forbidden"
    place = "" if unknown else "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in first["loc"]).lstrip(".")
    return Refusal(
        422,
        "invalid_json" if first["type"] == "json_invalid" else "invalid",
        f"{place or 'The body'}: {first['msg']}.",
        "See /docs for what the endpoint takes.",
    )


def _too_large(most: int) -> Refusal:
    return Refusal(413, "body_too_large", f"The body is larger than {most} bytes.", "Send fewer sequences at a time.")


def _forbidden(message: str) -> Refusal:
    return Refusal(403, "not_allowed", message, "Ask the PLM owner for a key that may.")
