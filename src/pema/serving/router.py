"""The one address of several workers: each request is passed on to one of them, and its answer back.

The requests of a session go to the worker that has it, with whose name the session's begins; all others go to the ready
worker with the fewest unanswered requests. Only the path is read here: keys, quotas and limits of requests are the
workers' business, and those of connections are this process's.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

import httpx2
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import Message, Receive, Scope, Send

from pema.serving.connections import BODY_SECONDS, Connections
from pema.serving.gate import Gate, log
from pema.serving.metrics import CONTENT_TYPE, merged
from pema.serving.record import RECORD, Record
from pema.serving.refusal import Refusal, disconnected, slow_body
from pema.serving.workers import Fleet, Worker, lost

HOP = frozenset(
    b"connection keep-alive proxy-authenticate proxy-authorization te trailer transfer-encoding upgrade expect".split()
)
"""Headers that belong to one connection, and are not passed on."""

ADDED = frozenset((b"date", b"server"))
"""Headers that this process adds to every answer itself."""


def create_router(fleet: Fleet, connections: Connections, *, local_only: bool = False) -> Starlette:
    """Make the application that passes requests on to the workers of a fleet, which it runs.

    Args:
        fleet: the workers.
        connections: those of this process.
        local_only: whether to answer only requests sent to this machine by its own name, and not by web pages.
    """

    @contextlib.asynccontextmanager
    async def lifespan(_app: Starlette) -> AsyncIterator[None]:
        running = [asyncio.create_task(task) for task in (fleet.run(), connections.watch())]
        yield
        for task in running:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
        await fleet.close()

    async def healthz(_scope: Scope) -> Response:
        if not fleet.healthy:
            raise Refusal(503, "broken", "The server cannot run its PLM.", "See its log.", retry_after=30)
        return JSONResponse({"status": "ok"})

    async def readyz(_scope: Scope) -> Response:
        fleet.choose()
        return JSONResponse({"status": "ready"})

    async def metrics(scope: Scope) -> Response:
        fleet.choose()  # at least one is ready
        answers = {worker: await worker.get("/metrics", scope["headers"]) for worker in fleet.ready}
        refused = next((answer for answer in answers.values() if answer.status_code != 200), None)
        if refused is not None:
            return Response(refused.content, refused.status_code, _kept(refused))
        texts = {str(worker.index): answer.text for worker, answer in answers.items()}
        return Response(merged(texts), media_type=CONTENT_TYPE)

    own = {"/healthz": healthz, "/readyz": readyz, "/metrics": metrics}

    async def passed(scope: Scope, receive: Receive, send: Send) -> None:
        path = scope["path"]
        if scope["method"] == "GET" and path in own:
            scope[RECORD].endpoint = path[1:]
            await (await own[path](scope))(scope, receive, send)
            return
        scope[RECORD].endpoint = "router"
        parts = path.split("/")
        session = parts[3] if parts[1:3] == ["v1", "sessions"] and len(parts) > 3 else ""
        with fleet.choose(session).answering() as worker:
            await _Passage(worker, scope, receive, send).run()

    async def refused(request: Request, refusal: Exception) -> Response:
        assert isinstance(refusal, Refusal)
        request.scope[RECORD].code = refusal.code
        return JSONResponse(refusal.body, refusal.status, refusal.headers)

    def answered(record: Record, status: int, seconds: float) -> None:
        if record.code is not None:  # what a worker answered it has logged itself
            log(record, status, seconds)

    app = Starlette(lifespan=lifespan, exception_handlers={Refusal: refused})
    app.router.default = passed
    app.add_middleware(Gate, state=fleet, answered=answered, connections=connections, local_only=local_only)
    return app


class _Passage:
    """The passage of one request to a worker and of its answer back."""

    def __init__(self, worker: Worker, scope: Scope, receive: Receive, send: Send) -> None:
        self._worker, self._scope, self._receive, self._send = worker, scope, receive, send
        headers = dict(scope["headers"])
        self._unknown_length = b"transfer-encoding" in headers
        self._read = asyncio.Event()
        if not self._unknown_length and headers.get(b"content-length", b"0") == b"0":
            self._read.set()

    async def run(self) -> None:
        asked = asyncio.ensure_future(self._worker.transport.handle_async_request(self._request()))
        left = asyncio.ensure_future(self._left())
        try:
            await asyncio.wait((asked, left), return_when=asyncio.FIRST_COMPLETED)
            left.cancel()  # before the answer is sent, during which the gate may read the rest of the body
            if not asked.done():
                raise disconnected()
            await self._answer(await asked)
        except httpx2.TransportError as error:
            raise lost() from error
        finally:
            asked.cancel()  # a worker drops the work of a client that has left
            (response, _) = await asyncio.gather(asked, left, return_exceptions=True)
            if isinstance(response, httpx2.Response):
                await response.aclose()

    async def _answer(self, response: httpx2.Response) -> None:
        headers = [(name.lower(), value) for name, value in response.headers.raw]
        headers = [header for header in headers if header[0] not in HOP | ADDED]
        await self._send({"type": "http.response.start", "status": response.status_code, "headers": headers})
        assert isinstance(response.stream, httpx2.AsyncByteStream)
        async for chunk in response.stream:
            await self._send({"type": "http.response.body", "body": chunk, "more_body": True})
        await self._send({"type": "http.response.body", "body": b"", "more_body": False})

    def _request(self) -> httpx2.Request:
        headers = [(name, value) for name, value in self._scope["headers"] if name not in HOP]
        if b"host" not in dict(headers):
            headers.append((b"host", b"localhost"))
        if self._unknown_length:
            headers.append((b"transfer-encoding", b"chunked"))
        query = self._scope["query_string"]
        path = self._scope.get("raw_path") or self._scope["path"].encode()
        url = httpx2.URL("http://worker").copy_with(raw_path=path + (b"?" + query if query else b""))
        return httpx2.Request(self._scope["method"], url, headers=headers, stream=_Stream(self))

    async def body(self) -> AsyncIterator[bytes]:
        """Yield the pieces of the request's body, as they arrive.

        Raises:
            Refusal: 408, they arrive too slowly; 400, the client left.
        """
        deadline = asyncio.get_running_loop().time() + BODY_SECONDS
        while not self._read.is_set():
            try:
                async with asyncio.timeout_at(deadline):
                    message: Message = await self._receive()
            except TimeoutError:
                raise slow_body(BODY_SECONDS) from None
            if message["type"] == "http.disconnect":
                raise disconnected()
            if not message.get("more_body", False):
                self._read.set()
            yield message.get("body", b"")

    async def _left(self) -> None:
        await self._read.wait()
        while (await self._receive())["type"] != "http.disconnect":
            pass


class _Stream(httpx2.AsyncByteStream):
    def __init__(self, passage: _Passage) -> None:
        self._passage = passage

    async def __aiter__(self) -> AsyncIterator[bytes]:
        async for piece in self._passage.body():
            yield piece


def _kept(response: httpx2.Response) -> dict[str, str]:
    names = ("content-type", "retry-after", "www-authenticate", "x-request-id")
    return {name: response.headers[name] for name in names if name in response.headers}
