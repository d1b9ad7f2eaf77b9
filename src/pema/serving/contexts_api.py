"""Endpoints that describe the PLM and that represent contexts."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from typing import Annotated

import torch
from fastapi import APIRouter, Depends
from fastapi.responses import Response, StreamingResponse
from starlette.requests import Request

from pema.owner.contract import ContextRepresentations
from pema.owner.wire import TENSORS, WireDtype, narrow, pack
from pema.serving import documented
from pema.serving.admission import Caller, admit
from pema.serving.batcher import Sequences
from pema.serving.messages import PLMMessage, PredictRequest, RepresentRequest, TokenizerMessage
from pema.serving.refusal import Refusal
from pema.serving.waiting import answered

router = APIRouter(prefix="/v1")
_CHUNK = 1 << 20


class TensorResponse(Response):
    """A body with tensors."""

    media_type = TENSORS


@router.get("/plm", responses=documented.errors(), summary="Description of the PLM, and what this key may do with it")
async def plm(caller: Annotated[Caller, Depends(admit("plm"))]) -> PLMMessage:
    """Return the description that memories and adapters are bound to, and the rules, limits and quotas of this key."""
    return caller.service.about(caller.account)


@router.get("/tokenizer", responses=documented.errors(), summary="The tokenizer as text files")
async def tokenizer(caller: Annotated[Caller, Depends(admit("tokenizer"))]) -> TokenizerMessage:
    """File names and their text, as `save_pretrained` writes them."""
    return TokenizerMessage(files=caller.service.tokenizer_files)


@router.get(
    "/head",
    response_class=TensorResponse,
    responses=documented.tensors("The head's tensors; settings and fingerprint in the header.") | documented.errors(),
    summary="The LM head, in the form that the policy gives to this key",
)
async def head(caller: Annotated[Caller, Depends(admit("head"))]) -> Response:
    """Return the head bundle as one safetensors file."""
    if caller.key.head == "none":
        raise Refusal(
            403, "head_withheld", "The LM head is withheld from this key.", "Ask the PLM owner for a key that gets it."
        )
    caller.require_tap()
    caller.account.quota.head()
    packed = await asyncio.to_thread(caller.service.heads.get, caller.plm)

    def chunks() -> Iterator[bytes]:
        # In pieces, so that a slow reader costs no copy of the whole head.
        view = memoryview(packed.content)
        for begin in range(0, len(view), _CHUNK):
            yield bytes(view[begin : begin + _CHUNK])

    return StreamingResponse(chunks(), media_type=TENSORS, headers={"Content-Length": str(len(packed.content))})


@router.post(
    "/represent",
    response_class=TensorResponse,
    responses=documented.tensors("representations (total, d_tap) and counts (n,), in the request's order.")
    | documented.body_errors(),
    openapi_extra=documented.body(RepresentRequest),
    summary="Teacher contexts",
)
async def represent(request: Request, caller: Annotated[Caller, Depends(admit("represent"))]) -> Response:
    """Return, for each sequence, the representations whose next token is at starts[i] .. len - 1."""
    caller.require_contexts("teacher")
    caller.require_tap()
    asked = await caller.read(request, RepresentRequest)
    tokens = caller.service.checks.represent(asked.sequences, asked.starts)
    work = caller.sequences("represent", asked.sequences, asked.starts)
    with caller.spending(tokens, len(asked.sequences), tokens - sum(asked.starts)):
        return await _answered(request, caller, work, tokens, asked.dtype)


@router.post(
    "/predict",
    response_class=TensorResponse,
    responses=documented.tensors("representations (total, d_tap), generated (total,) and counts (n,), in order.")
    | documented.body_errors(),
    openapi_extra=documented.body(PredictRequest),
    summary="Predicted contexts",
)
async def predict(request: Request, caller: Annotated[Caller, Depends(admit("predict"))]) -> Response:
    """Greedy decoding from each prompt for at most steps[i] tokens, steps padded to the bucket."""
    caller.require_contexts("predicted")
    caller.require_tap()
    asked = await caller.read(request, PredictRequest)
    tokens = caller.service.checks.predict(asked.prompts, asked.steps)
    work = caller.sequences("predict", asked.prompts, asked.steps)
    with caller.spending(tokens, len(asked.prompts), sum(asked.steps)):
        return await _answered(request, caller, work, tokens, asked.dtype)


async def _answered(request: Request, caller: Caller, work: Sequences, tokens: int, dtype: WireDtype) -> Response:
    waiting = caller.service.batcher.contexts(work, key=caller.key.name, tokens=tokens)
    answers = await answered(request, waiting)
    packed = await asyncio.to_thread(_packed, answers, dtype)
    caller.record.representations = sum(len(answer.representations) for answer in answers)
    return TensorResponse(packed)


def _packed(answers: Sequence[ContextRepresentations], dtype: WireDtype) -> bytes:
    tensors = {
        "representations": narrow(torch.cat([answer.representations for answer in answers]), dtype),
        "counts": torch.tensor([len(answer.representations) for answer in answers]),
    }
    generated = [answer.generated for answer in answers if answer.generated is not None]
    if generated:
        tensors["generated"] = torch.cat(generated)
    return pack(tensors)
