"""Endpoints of decoding sessions."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Depends, Path
from fastapi.responses import Response
from starlette.requests import Request
from torch import Tensor

from pema.errors import DataError
from pema.owner.contract import Session
from pema.owner.local.session import Step
from pema.owner.wire import narrow, pack
from pema.serving import documented
from pema.serving.admission import Caller, admit
from pema.serving.contexts_api import TensorResponse
from pema.serving.messages import AdvanceRequest, OpenRequest
from pema.serving.refusal import POLICY_CHANGED, Refusal, disconnected, session_expired
from pema.serving.sessions import Entry
from pema.serving.waiting import answered

router = APIRouter(prefix="/v1/sessions")
Name = Annotated[str, Path(description="The session's name, from the answer that opened it.", max_length=64)]


@router.post(
    "",
    status_code=201,
    response_class=TensorResponse,
    responses=documented.tensors("representations (rows, d_tap); session and expires_in (seconds) in the header.", 201)
    | documented.body_errors(),
    openapi_extra=documented.body(OpenRequest),
    summary="Open a decoding session",
)
async def open_session(request: Request, caller: Annotated[Caller, Depends(admit("sessions"))]) -> Response:
    """Open a session with one row per prompt; the server keeps its state until the session is closed or idle."""
    caller.require_tap()
    service = caller.service
    asked = await caller.read(request, OpenRequest)
    tokens = service.checks.prompts(asked.prompts)
    lengths = [len(prompt) for prompt in asked.prompts]
    with service.sessions.place(caller.key.name, service.session_cost.bytes(len(lengths), max(lengths))):

        def begin() -> tuple[Session, Tensor, int]:
            session = caller.plm.open_session(asked.prompts)
            return session, session.representations, session.held_bytes

        orphans: list[object] = []
        with caller.spending(tokens, len(lengths), len(lengths)):
            opened = service.batcher.call(begin, key=caller.key.name, tokens=tokens)
            session, representations, held = await answered(request, opened, orphans.append)
    # There is no await from here on, so the reserved memory becomes the session's.
    if orphans:
        session.close()  # No client knows its name.
        raise disconnected()
    if not caller.current:
        session.close()
        raise session_expired(POLICY_CHANGED)
    try:
        tensors = {"representations": narrow(representations, asked.dtype)}
    except DataError:
        session.close()
        raise
    entry = service.sessions.add(caller.key.name, session, asked.dtype, lengths, held)
    caller.record.representations = len(representations)
    texts = {"session": entry.name, "expires_in": f"{service.policy.limits.session_idle_seconds:g}"}
    return TensorResponse(pack(tensors, texts), status_code=201)


@router.post(
    "/{name}/advance",
    response_class=TensorResponse,
    responses=documented.tensors("representations (rows, d_tap) of the new rows.")
    | documented.body_errors(404, 409, 410),
    openapi_extra=documented.body(AdvanceRequest),
    summary="One step of a session",
)
async def advance(request: Request, name: Name, caller: Annotated[Caller, Depends(admit("sessions"))]) -> Response:
    """Row i becomes row parents[i], followed by tokens[i]. The last step, sent again, gets the same answer."""
    caller.require_tap()
    sessions = caller.service.sessions
    asked = await caller.read(request, AdvanceRequest)
    entry = sessions.find(name, caller.key.name)
    async with entry.lock:
        sessions.find(name, caller.key.name)  # It may have been closed while another step of it ran.
        if asked.step == entry.step and asked == entry.request:
            return TensorResponse(entry.answer)
        if asked.step != entry.step + 1:
            raise Refusal(
                409,
                "wrong_step",
                f"Step {asked.step} is requested, the session has taken {entry.step}.",
                f"Send step {entry.step + 1}, or the last step again exactly as it was.",
            )
        return await _step(request, caller, entry, asked)


@router.delete(
    "/{name}", status_code=204, responses=documented.errors(422), summary="Close a session", response_class=Response
)
async def close(name: Name, caller: Annotated[Caller, Depends(admit("sessions", counted=False))]) -> Response:
    """Free the memory of a session; repeated, or for an unknown session, it does nothing."""
    await caller.service.sessions.delete(name, caller.key.name)
    return Response(status_code=204)


async def _step(request: Request, caller: Caller, entry: Entry, asked: AdvanceRequest) -> Response:
    sessions, rows = caller.service.sessions, len(asked.tokens)
    lengths = caller.service.checks.step(asked.tokens, asked.parents, entry.lengths)
    step = Step(entry.session, asked.tokens, asked.parents)
    with sessions.growing(entry, rows), caller.spending(rows, rows, rows):
        taken = caller.service.batcher.step(step, key=caller.key.name, tokens=rows, width=entry.width + 1)
        try:
            representations, held = await answered(request, taken)
            answer = pack({"representations": narrow(representations, entry.dtype)})
        except BaseException as error:
            turned_away = isinstance(error, Refusal) and error.code == "busy"
            if not turned_away and not taken.cancelled():
                sessions.drop(entry)  # Half a step may have been taken.
            raise
    sessions.stepped(entry, lengths, held, asked, answer)
    caller.record.representations = len(representations)
    return TensorResponse(answer)
