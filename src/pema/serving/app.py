"""The web application: endpoints, errors and life cycle."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import torch
from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.requests import Request

from pema import __version__
from pema.errors import CapacityError, DataError
from pema.serving import contexts_api, operations_api, sessions_api
from pema.serving.connections import Connections
from pema.serving.gate import Gate, log
from pema.serving.lifecycle import Lifecycle
from pema.serving.metrics import Metrics
from pema.serving.record import RECORD, Record
from pema.serving.refusal import Refusal
from pema.serving.reload import Reloader
from pema.serving.service import Service

_ABOUT = """
A frozen language model as a service of representations. Bodies with tensors are safetensors, all others JSON.
Errors are `{"error": {"code", "message", "remedy"}}`.
"""


def create_app(
    load: Callable[[Metrics], Service],
    connections: Connections | None = None,
    *,
    policy: Path | None = None,
    number: int | None = None,
    local_only: bool = False,
) -> FastAPI:
    """Make the application; `app.state.lifecycle` is its state, `app.state.reloader` rereads its policy.

    Args:
        load: makes the service once the application runs.
        connections: those of the process; None if something else accepts them.
        policy: the policy file to reread.
        number: see `Reloader`.
        local_only: whether to answer only requests sent to this machine by its own name, and not by web pages.
    """
    metrics = Metrics()
    connections = Connections(1) if connections is None else connections
    lifecycle = Lifecycle(lambda: load(metrics), metrics.usage)
    reloader = Reloader(policy, lifecycle, connections, number)

    @contextlib.asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        running = [asyncio.create_task(task) for task in (lifecycle.run(), connections.watch(), reloader.watch())]
        yield
        for task in running:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
        await lifecycle.close()

    # FastAPI's own page of documentation loads scripts from elsewhere, beside a field for the key.
    app = FastAPI(
        title="PEMA server", version=__version__, description=_ABOUT, lifespan=lifespan, docs_url=None, redoc_url=None
    )
    app.state.lifecycle, app.state.metrics, app.state.reloader = lifecycle, metrics, reloader
    for api in (contexts_api, sessions_api, operations_api):
        app.include_router(api.router)

    def answered(record: Record, status: int, seconds: float) -> None:
        metrics.request(record, status, seconds)
        log(record, status, seconds)

    app.add_middleware(Gate, state=lifecycle, answered=answered, connections=connections, local_only=local_only)

    @app.exception_handler(Refusal)
    async def refused(request: Request, refusal: Refusal) -> JSONResponse:
        request.scope[RECORD].code = refusal.code
        return JSONResponse(refusal.body, refusal.status, refusal.headers)

    @app.exception_handler(DataError)
    async def unusable(request: Request, error: DataError) -> JSONResponse:
        return await refused(request, Refusal(422, "invalid", str(error), "Change the request."))

    @app.exception_handler(CapacityError)
    @app.exception_handler(torch.OutOfMemoryError)
    async def no_room(request: Request, _error: Exception) -> JSONResponse:
        message = "The PLM has no memory left for this request."
        return await refused(request, Refusal(503, "no_room", message, "Send less at a time.", retry_after=1))

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, _error: RequestValidationError) -> JSONResponse:
        return await refused(request, Refusal(422, "invalid", "The path is malformed.", "See /docs."))

    @app.exception_handler(HTTPException)
    async def no_route(request: Request, error: HTTPException) -> JSONResponse:
        refusal = Refusal(error.status_code, "no_such_endpoint", f"{error.detail}.", "See /docs.")
        headers = dict(error.headers or {})
        request.scope[RECORD].code = refusal.code
        return JSONResponse(refusal.body, refusal.status, headers)

    return app
