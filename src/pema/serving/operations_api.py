"""Endpoints for whoever runs the server: alive, ready, and how it does."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Depends
from fastapi.responses import Response
from starlette.requests import Request

from pema.serving import documented
from pema.serving.admission import Caller, admit
from pema.serving.gate import RECORD
from pema.serving.lifecycle import Lifecycle
from pema.serving.messages import StatusMessage
from pema.serving.metrics import CONTENT_TYPE
from pema.serving.refusal import Refusal

router = APIRouter()
_UNAVAILABLE = documented.only(503)


@router.get("/healthz", responses=_UNAVAILABLE, summary="Whether the process works")
async def healthz(request: Request) -> StatusMessage:
    """Alive, though perhaps not ready."""
    request.scope[RECORD].endpoint = "healthz"
    lifecycle: Lifecycle = request.app.state.lifecycle
    if not lifecycle.healthy():
        raise Refusal(503, "broken", "The server cannot run its PLM.", "Start it again.", retry_after=30)
    return StatusMessage(status="ok")


@router.get("/readyz", responses=_UNAVAILABLE, summary="Whether requests may be sent here")
async def readyz(request: Request) -> StatusMessage:
    """Ready: the PLM is loaded and the server is not about to stop."""
    request.scope[RECORD].endpoint = "readyz"
    request.app.state.lifecycle.service()
    return StatusMessage(status="ready")


@router.get(
    "/metrics",
    response_class=Response,
    responses=documented.text("Prometheus' text format.") | documented.errors(),
    summary="Metrics for Prometheus",
)
async def metrics(request: Request, caller: Annotated[Caller, Depends(admit("metrics", counted=False))]) -> Response:
    """Requests, latency, tokens, representations, batches, queue, sessions."""
    return Response(request.app.state.metrics.text(), media_type=CONTENT_TYPE)
