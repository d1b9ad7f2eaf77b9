"""Request bodies, limited before they are read, while they arrive and before they are parsed."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from pydantic import ValidationError
from starlette.requests import ClientDisconnect, Request

from pema.serving.connections import BODY_SECONDS
from pema.serving.messages import Message
from pema.serving.pending import PendingBytes
from pema.serving.policy import Limits
from pema.serving.refusal import Refusal, disconnected, slow_body

M = TypeVar("M", bound=Message)
_FIELDS, _LISTS, _MORE = 8, 8, 64
"""Upper bounds of the fields, lists and values that a request has beside its sequences."""

_LARGE = 1 << 15
"""Size in bytes from which a body is parsed outside the event loop."""

_PARSER = ThreadPoolExecutor(1, "pema-parser")


async def read(request: Request, model: type[M], limits: Limits, pending: PendingBytes) -> M:
    """Read and parse the body of a request; refuse one that is too large before reading it to its end.

    Args:
        request: the request.
        model: type of the body.
        limits: limits of its size.
        pending: pending bytes of its key, which include the body while it is read.

    Raises:
        Refusal: 415, its content type is not JSON; 413, it is too large, or requests too much; 408, it arrives too
            slowly; 422, it is not what the endpoint expects; 429, the key has too many pending bytes.
    """
    content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if content_type != "application/json":
        # A web page may send any other type to a server on the loopback without a preflight request.
        raise Refusal(415, "not_json", "The content type of the body is not application/json.", "Set Content-Type.")
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
        raise slow_body(BODY_SECONDS) from None
    except ClientDisconnect:
        raise disconnected() from None
    except ValidationError as error:
        raise _malformed(error) from None
    finally:
        pending.give(len(body))


def _require_bounded(body: bytearray, limits: Limits) -> None:
    """Refuse a body that requests too much, before any value of it is parsed.

    Counting bytes takes a hundredth of the time of parsing, and no permitted body has more of them: the only texts in
    one are the names of its fields and of a precision.
    """
    if body.count(b":") > _FIELDS:
        raise Refusal(422, "invalid", "The body: it has more fields than any request.", "See /docs.")
    for mark, most, what in (
        (b"[", limits.batch_sequences + _LISTS, "lists"),
        (b",", limits.batch_tokens + limits.batch_sequences + 2 * limits.session_rows + _MORE, "values"),
    ):
        count = body.count(mark)
        if count > most:
            message = f"The body contains over {count} {what}, at most {most} are allowed."
            raise Refusal(413, "too_much", message, "Send fewer per request; GET /v1/plm shows the limits.")


def _malformed(error: ValidationError) -> Refusal:
    # The input itself, which an error of pydantic contains too, stays out of the answer.
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    unknown = first["type"] == "extra_forbidden"
    place = "" if unknown else "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in first["loc"]).lstrip(".")
    return Refusal(
        422,
        "invalid_json" if first["type"] == "json_invalid" else "invalid",
        f"{place or 'The body'}: {first['msg']}.",
        "See /docs for the body that the endpoint expects.",
    )


def _too_large(most: int) -> Refusal:
    return Refusal(413, "body_too_large", f"The body is larger than {most} bytes.", "Send fewer sequences at a time.")
