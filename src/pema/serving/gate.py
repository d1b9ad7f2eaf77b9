"""The outermost layer: it numbers, counts, times and logs every request, and answers every error as JSON.

It also keeps clients from holding the server up: an answer that is not read is dropped, and a body that arrives after
its answer is not read any further.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import secrets
import time
from collections.abc import Callable

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pema.serving.connections import Connections, Peer, host_of, is_loopback
from pema.serving.record import RECORD, Record
from pema.serving.refusal import Refusal
from pema.serving.state import State

logger = logging.getLogger("pema.serving.requests")
WRITE_SECONDS = 30.0
"""Maximum seconds in which a client reads one piece of an answer."""

PIECE = 1 << 18
"""Bytes of a piece."""

LINGER_SECONDS, LINGER_BYTES = 1.0, 1 << 20
"""Maximum seconds and bytes for which the rest of a body is discarded after its answer: a client that is cut off while
it sends may never read the answer."""


class Gate:
    """ASGI middleware around the whole application.

    Args:
        app: the application.
        state: counts what is in flight.
        answered: called with the record of each request, its status and seconds.
        connections: of the process.
        local_only: whether to refuse requests that were not sent to the loopback by name: without keys, a web page
            whose name was rebound to this machine (DNS rebinding) could read everything that a local program can.
    """

    def __init__(
        self,
        app: ASGIApp,
        state: State,
        answered: Callable[[Record, int, float], None],
        connections: Connections,
        local_only: bool,
    ) -> None:
        self._app = app
        self._state = state
        self._answered = answered
        self._connections = connections
        self._local_only = local_only

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, and record its result."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        record = scope[RECORD] = Record(secrets.token_hex(8))
        peer: Peer | None = tuple(scope["client"]) if scope.get("client") else None
        body = _Body(scope, receive)
        answer = _Answer(send, body, record, lambda: self._connections.drop(peer))
        begun = time.perf_counter()
        # Requests for the server's own state do not keep it from stopping.
        work = scope["path"].startswith("/v1/")
        self._state.in_flight += work
        self._connections.begin(peer)
        try:
            if self._local_only and not _is_local(scope):
                message = "The request was sent to another host than this machine, or by a page of another site."
                await _refuse(answer.send, record, Refusal(403, "wrong_host", message, "Ask 127.0.0.1 or localhost."))
            else:
                await self._app(scope, body.receive, answer.send)
        except _UnreadError:
            record.code = "unread"
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LINGER_SECONDS):
                    await receive()  # The end of the connection; without it the answer would count as truncated.
        except Exception:
            logger.error("a request failed", extra={"fields": {"request": record.request}}, exc_info=True)
            record.code = "internal"
            if answer.status == 0:
                message, remedy = "The server failed.", "Report the X-Request-Id to the PLM owner."
                await _refuse(answer.send, record, Refusal(500, "internal", message, remedy))
        finally:
            self._connections.end(peer)
            self._state.in_flight -= work
            for end in record.ends:
                end()
            self._answered(record, answer.status, time.perf_counter() - begun)


class _UnreadError(Exception):
    """The client does not read its answer."""


class _Body:
    """The body of a request, which knows whether it is complete."""

    def __init__(self, scope: Scope, receive: Receive) -> None:
        self._receive = receive
        headers = dict(scope["headers"])
        self.complete = b"transfer-encoding" not in headers and headers.get(b"content-length", b"0") == b"0"

    async def receive(self) -> Message:
        message = await self._receive()
        self.complete = self.complete or not message.get("more_body", False)
        return message

    async def discard(self) -> None:
        """Discard the rest of the body, within limits."""
        left = LINGER_BYTES
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LINGER_SECONDS):
                while not self.complete and left > 0:
                    left -= len((await self.receive()).get("body", b"")) + 1


class _Answer:
    """An answer that is sent in pieces, each of which has to be read in time."""

    def __init__(self, send: Send, body: _Body, record: Record, drop: Callable[[], None]) -> None:
        self._send, self._body, self._record, self._drop = send, body, record, drop
        self._closes = False
        self.status = 0

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            self._closes = not self._body.complete
            headers = [*message.get("headers", [])]
            # The answer of a worker has its own.
            own = ((b"x-request-id", self._record.request.encode()), (b"cache-control", b"no-store"))
            headers += [header for header in own if header[0] not in dict(headers)]
            message["headers"] = [*headers, *([(b"connection", b"close")] if self._closes else [])]
            await self._piece(message)
            return
        content, more = message.get("body", b""), message.get("more_body", False)
        if len(content) <= PIECE and not (self._closes and not more):
            await self._piece(message)
            return
        view = memoryview(content)
        for begin in range(0, len(view), PIECE):
            await self._piece({**message, "body": bytes(view[begin : begin + PIECE]), "more_body": True})
        if not more:
            if self._closes:
                await self._body.discard()
            # Sent after the piece before it was read, so that no answer ends while much of it is in memory.
            await self._piece({**message, "body": b"", "more_body": False})

    async def _piece(self, message: Message) -> None:
        try:
            async with asyncio.timeout(WRITE_SECONDS):
                await self._send(message)
        except TimeoutError:
            self._drop()
            raise _UnreadError from None


def _is_local(scope: Scope) -> bool:
    headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
    site = headers.get(b"sec-fetch-site", "none")
    return is_loopback(host_of(headers.get(b"host", ""))) and site in ("none", "same-origin")


def log(record: Record, status: int, seconds: float) -> None:
    """Log an answered request."""
    # A health check every second would fill the log.
    level = logging.DEBUG if record.endpoint in ("healthz", "readyz", "metrics") else logging.INFO
    values = vars(record) | {"status": status, "milliseconds": round(1000 * seconds, 1)}
    fields = {name: value for name, value in values.items() if value is not None and name != "ends"}
    logger.log(level, "request", extra={"fields": fields})


async def _refuse(send: Send, record: Record, refusal: Refusal) -> None:
    record.code = refusal.code
    body = json.dumps(refusal.body).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": refusal.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
