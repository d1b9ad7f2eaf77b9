"""Waiting for a client's work, as long as the client waits."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

from starlette.requests import Request

from pema.serving.refusal import disconnected

T = TypeVar("T")


async def answered(request: Request, work: Future[T], orphaned: Callable[[T], object] = lambda _: None) -> T:
    """Return the result of the work. If the client leaves before the work starts, it is removed from the queue.

    Args:
        request: the client's request, whose body has been read.
        work: from the batcher.
        orphaned: called with the result if the client left while the work ran, which cannot be stopped.

    Raises:
        Refusal: 400, the client left and the work was not done.
    """
    waiting = asyncio.wrap_future(work)
    left = asyncio.ensure_future(_left(request))
    try:
        await asyncio.wait((waiting, left), return_when=asyncio.FIRST_COMPLETED)
        if not waiting.done() and work.cancel():
            raise disconnected()
        result = await waiting
        if left.done():
            orphaned(result)
        return result
    finally:
        left.cancel()


async def _left(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
