"""Request bodies: bounded before they are read, while they come and before they are parsed."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from pydantic import ValidationError
from starlette.requests import ClientDisconnect, Request

from pema.serving.messages import Message
from pema.serving.pending import PendingBytes
from pema.serving.policy import Limits
from pema.serving.refusal import Refusal

M = TypeVar("M", bound=Message)
BODY_SECONDS = 30.0
"""How long a request's body may take to arrive."""

_FIELDS, _LISTS, _MORE = 8, 8, 64
"""More fields, lists and values than any request has beside its sequences."""

_LARGE = 1 << 15
"""Bytes from which on a body is parsed beside the event loop."""

_PARSER = ThreadPoolExecutor(1, "pema-parser")


async def read(request: Request, model: type[M], limits: Limits, pending: PendingBytes) -> M:
    """The body of a request, refused before it is read to its end where it is too large.

    Args:
        request: whose body.
        model: what it has to be.
        limits: how large it may be.
        pending: what its key holds; the body counts while it is here.

    Raises:
        Refusal: 415, it is not JSON by its content type; 413, it is too large, or asks for more than may be asked for;
            408, it comes too slowly; 422, it is not what the endpoint takes; 429, the key holds too much.
    """
    content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if content_type != "application/json":
        # A web page may send any other type to a server on the loopback without asking it first.
        raise Refusal(415, "not_json", "The body is not sent as application/json.", "Set Content-Type.")
    most = limits.body_bytes
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared[:20]) > most:
        raise _too_large(most)
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for chunk in request.stream():
                if len(body) + len(chunk) > most:
                    raise _too_large(most)
                pending.take(len(chunk))
                body += chunk
        _require_bounded(body, limits)
        if len(body) < _LARGE:
            return model.model_validate_json(bytes(body))
        return await asyncio.get_running_loop().run_in_executor(_PARSER, model.model_validate_json, bytes(body))
    except TimeoutError:
        raise Refusal(408, "slow_body", f"The body took over {BODY_SECONDS:g} seconds.", "Send it again.") from None
    except ClientDisconnect:
        raise disconnected() from None
    except ValidationError as error:
        raise _malformed(error) from None
    finally:
        pending.give(len(body))


def disconnected() -> Refusal:
    """400: nobody is there to be answered."""
    return Refusal(400, "disconnected", "The client left.", "Send the request again.")


def _require_bounded(body: bytearray, limits: Limits) -> None:
    """Refuse what asks for too much, before a value of it is parsed.

    Counting bytes takes a hundredth of what parsing takes, and no body that may be asked for has more of them: the
    only texts in one are the names of its fields and of a precision.
    """
    if body.count(b":") > _FIELDS:
        raise Refusal(422, "invalid", "The body: it has more fields than any request.", "See /docs.")
    for mark, most, what in (
        (b"[", limits.batch_sequences + _LISTS, "lists"),
        (b",", limits.batch_tokens + limits.batch_sequences + 2 * limits.session_rows + _MORE, "values"),
    ):
        count = body.count(mark)
        if count > most:
            message = f"The body holds over {count} {what}, at most {most} may be asked for."
            raise Refusal(413, "too_much", message, "Send fewer in a request; GET /v1/plm tells the limits.")


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
