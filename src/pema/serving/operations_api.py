"""Endpoints for the operator of the server: health, readiness, metrics, documentation."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Depends
from fastapi.responses import HTMLResponse, Response
from starlette.requests import Request

from pema.serving import documented
from pema.serving.admission import Caller, admit
from pema.serving.lifecycle import Lifecycle
from pema.serving.messages import StatusMessage
from pema.serving.metrics import CONTENT_TYPE
from pema.serving.record import RECORD
from pema.serving.refusal import Refusal

router = APIRouter()
_PAGE_RULES = {"Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'"}
_UNAVAILABLE = documented.only(503)


@router.get("/healthz", responses=_UNAVAILABLE, summary="Whether the process works")
async def healthz(request: Request) -> StatusMessage:
    """Alive, but not necessarily ready."""
    request.scope[RECORD].endpoint = "healthz"
    lifecycle: Lifecycle = request.app.state.lifecycle
    if not lifecycle.healthy():
        raise Refusal(503, "broken", "The server cannot run its PLM.", "Restart it.", retry_after=30)
    return StatusMessage(status="ok")


@router.get("/readyz", responses=_UNAVAILABLE, summary="Whether requests may be sent here")
async def readyz(request: Request) -> StatusMessage:
    """Ready: the PLM is loaded and the server is not stopping."""
    request.scope[RECORD].endpoint = "readyz"
    request.app.state.lifecycle.service()
    return StatusMessage(status="ready")


@router.get("/docs", include_in_schema=False)
async def docs(request: Request) -> HTMLResponse:
    """Return the API as a page that loads nothing and runs nothing."""
    request.scope[RECORD].endpoint = "docs"
    return HTMLResponse(documented.page(request.app.openapi()), headers=_PAGE_RULES)


@router.get(
    "/metrics",
    response_class=Response,
    responses=documented.text("Prometheus' text format.") | documented.errors(),
    summary="Metrics for Prometheus",
)
async def metrics(request: Request, caller: Annotated[Caller, Depends(admit("metrics", counted=False))]) -> Response:
    """Return requests, latency, tokens, representations, batches, queue, sessions, usage per key."""
    return Response(request.app.state.metrics.text(), media_type=CONTENT_TYPE)
