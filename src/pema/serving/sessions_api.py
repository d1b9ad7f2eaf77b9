"""Endpoints of decoding sessions."""

from __future__ import annotations

import asyncio
from typing import Annotated

from fastapi import APIRouter, Depends, Path
from fastapi.responses import Response
from starlette.requests import Request
from torch import Tensor

from pema.errors import DataError
from pema.owner.contract import Session
from pema.owner.session import Step
from pema.owner.wire import narrow, pack
from pema.serving import documented
from pema.serving.admission import Caller, admit, read
from pema.serving.contexts_api import TensorResponse
from pema.serving.messages import AdvanceRequest, OpenRequest
from pema.serving.refusal import Refusal
from pema.serving.sessions import Entry

router = APIRouter(prefix="/v1/sessions")
Name = Annotated[str, Path(description="The session's name, as opening it told.", max_length=64)]


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
    """One row per prompt; the server keeps what the PLM remembers of them until the session is closed or idle."""
    caller.require_tap()
    service = caller.service
    asked = await read(request, OpenRequest, service.policy.limits.body_bytes)
    tokens = service.checks.prompts(asked.prompts)
    with service.sessions.place(caller.key.name):
        caller.spend(tokens, len(asked.prompts))

        def begin() -> tuple[Session, Tensor, int]:
            session = caller.plm.open_session(asked.prompts)
            return session, session.representations, session.held_bytes

        opened = service.batcher.call(begin, key=caller.key.name, tokens=tokens)
        session, representations, held = await asyncio.wrap_future(opened)
        try:
            tensors = {"representations": narrow(representations, asked.dtype)}
        except DataError:
            session.close()
            raise
        lengths = [len(prompt) for prompt in asked.prompts]
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
    """Row i becomes row parents[i] with tokens[i] behind it. The last step again gets the same answer again."""
    caller.require_tap()
    sessions = caller.service.sessions
    asked = await read(request, AdvanceRequest, caller.service.policy.limits.body_bytes)
    entry = sessions.find(name, caller.key.name)
    async with entry.lock:
        sessions.find(name, caller.key.name)  # It may have been closed while another step of it ran.
        if asked.step == entry.step and asked == entry.request:
            return TensorResponse(entry.answer)
        if asked.step != entry.step + 1:
            raise Refusal(
                409,
                "wrong_step",
                f"Step {asked.step} is asked for, the session has taken {entry.step}.",
                f"Send step {entry.step + 1}, or the last step again exactly as it was.",
            )
        return await _step(caller, entry, asked)


@router.delete(
    "/{name}", status_code=204, responses=documented.errors(422), summary="Close a session", response_class=Response
)
async def close(name: Name, caller: Annotated[Caller, Depends(admit("sessions", counted=False))]) -> Response:
    """Free what the server keeps; nothing happens the second time, or where there never was such a session."""
    await caller.service.sessions.delete(name, caller.key.name)
    return Response(status_code=204)


async def _step(caller: Caller, entry: Entry, asked: AdvanceRequest) -> Response:
    sessions = caller.service.sessions
    lengths = caller.service.checks.step(asked.tokens, asked.parents, entry.lengths)
    caller.spend(len(asked.tokens), len(asked.tokens))

    step = Step(entry.session, asked.tokens, asked.parents)
    taken = caller.service.batcher.step(step, key=caller.key.name, tokens=len(asked.tokens))
    try:
        found, held = await asyncio.wrap_future(taken)
        answer = pack({"representations": narrow(found, entry.dtype)})
    except BaseException:
        sessions.drop(entry)  # Half a step may have been taken.
        raise
    sessions.stepped(entry, lengths, held, asked, answer)
    caller.record.representations = len(found)
    return TensorResponse(answer)
