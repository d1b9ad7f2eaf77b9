"""The outermost layer: numbers, counts, times and logs every request, and lets no error out as anything but JSON."""

from __future__ import annotations

import json
import logging
import secrets
import time
from dataclasses import dataclass

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pema.serving.lifecycle import Lifecycle
from pema.serving.metrics import Metrics
from pema.serving.refusal import Refusal

logger = logging.getLogger("pema.serving.requests")
RECORD = "pema.record"
"""Where in its scope a request's record lies."""


@dataclass
class Record:
    """What is noted of a request: names and numbers, nothing that the client sent.

    Attributes:
        request: its number, which the answer carries too.
        endpoint: what it was for; never the path, in which a session's name may stand.
        key: name of the API key.
        code: of the error, where there was one.
        sequences: rows that it was about.
        tokens: that it asked for.
        representations: that it was given.
    """

    request: str
    endpoint: str = "other"
    key: str | None = None
    code: str | None = None
    sequences: int = 0
    tokens: int = 0
    representations: int = 0


class Gate:
    """ASGI middleware around the whole application."""

    def __init__(self, app: ASGIApp, lifecycle: Lifecycle, metrics: Metrics) -> None:
        self._app = app
        self._lifecycle = lifecycle
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, and note how it went."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        record = scope[RECORD] = Record(secrets.token_hex(8))
        status = 0
        begun = time.perf_counter()

        async def send_on(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [
                    *message.get("headers", []),
                    (b"x-request-id", record.request.encode()),
                    (b"cache-control", b"no-store"),
                ]
            await send(message)

        # What is asked of the server's own state does not keep it from stopping.
        work = scope["path"].startswith("/v1/")
        self._lifecycle.in_flight += work
        try:
            await self._app(scope, receive, send_on)
        except Exception:
            logger.error("a request failed", extra={"fields": {"request": record.request}}, exc_info=True)
            record.code = "internal"
            if status == 0:
                await _internal_error(send_on)
        finally:
            self._lifecycle.in_flight -= work
            seconds = time.perf_counter() - begun
            self._metrics.request(record.endpoint, status, seconds, record.tokens, record.representations)
            # A client that asks for health every second is no news.
            level = logging.DEBUG if record.endpoint in ("healthz", "readyz", "metrics") else logging.INFO
            logger.log(level, "request", extra={"fields": _fields(record, status, seconds)})


def _fields(record: Record, status: int, seconds: float) -> dict[str, object]:
    return {
        name: value
        for name, value in (vars(record) | {"status": status, "milliseconds": round(1000 * seconds, 1)}).items()
        if value is not None
    }


async def _internal_error(send: Send) -> None:
    refusal = Refusal(500, "internal", "The server failed.", "Report the X-Request-Id to whoever runs it.")
    body = json.dumps(refusal.body).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": 500, "headers": headers})
    await send({"type": "http.response.body", "body": body})
