"""A server's life: loading, ready, draining; and what is in flight."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import threading
from collections.abc import Callable
from concurrent.futures import Future

from pema.serving.refusal import Refusal
from pema.serving.service import Service
from pema.serving.usage import Usage

CLOSE_SECONDS = 10.0
"""How long a call of the PLM that nobody waits for any more may keep the process from ending."""


LARGE_BYTES = 1 << 26
"""Of requests and answers under way, behind which the memory that they took is given back to the system."""


class Lifecycle:
    """Loads the service beside the event loop, and says whether it may be used.

    Args:
        load: makes the service; runs in a thread, for it can take minutes.

    Attributes:
        in_flight: requests that are being answered.
        draining: whether the server is about to stop.
        failure: what loading failed with, or None.
    """

    def __init__(self, load: Callable[[], Service], usage: Usage) -> None:
        self._load = load
        self._usage = usage
        self._service: Service | None = None
        self.in_flight = 0
        self.draining = False
        self.failure: BaseException | None = None

    async def run(self) -> None:
        """Load the service, then close idle sessions until cancelled."""
        loaded: Future[Service] = Future()

        def load() -> None:
            loaded.set_running_or_notify_cancel()
            try:
                loaded.set_result(self._load())
            except BaseException as error:
                loaded.set_exception(error)

        # A thread of its own that nobody waits for: a server that is told to stop while it loads stops at once.
        threading.Thread(target=load, name="pema-loading", daemon=True).start()
        try:
            self._service = service = await asyncio.wrap_future(loaded)
        except Exception as error:
            self.failure = error
            return
        large = False
        while True:
            await asyncio.sleep(min(1.0, service.policy.limits.session_idle_seconds / 4))
            service.sessions.sweep()
            self._usage.roll()
            pending = service.pending_bytes
            large = large or pending > LARGE_BYTES
            if large and not pending:
                large = False
                await asyncio.to_thread(_give_back)

    def service(self) -> Service:
        """The service, where requests may be sent to it.

        Raises:
            Refusal: 503, it is loading or about to stop.
        """
        if self.draining:
            raise Refusal(503, "draining", "The server is about to stop.", "Try again when it is back.", retry_after=10)
        if self._service is None:
            raise Refusal(503, "loading", "The PLM is being loaded.", "Try again in a moment.", retry_after=5)
        return self._service

    @property
    def loaded(self) -> Service | None:
        """The service; None while it is being loaded, or if that failed."""
        return self._service

    @property
    def loading(self) -> bool:
        """Whether the service is still being made."""
        return self._service is None and self.failure is None

    @property
    def stuck(self) -> bool:
        """Whether a thread runs that cannot be stopped: one that loads, or one in the middle of a call of the PLM."""
        return self.loading or (self._service is not None and self._service.batcher.alive)

    def healthy(self) -> bool:
        """Whether the server can become ready, or is."""
        return self.failure is None and (self._service is None or self._service.batcher.alive)

    async def close(self) -> None:
        """Finish what waits and free everything."""
        self.draining = True
        self._usage.close()
        if self._service is not None:
            await asyncio.to_thread(self._service.batcher.close, CLOSE_SECONDS)
            self._service.sessions.close_all()


def _give_back() -> None:
    """Hand freed memory back to the system, where its library keeps it: answers leave gaps of their size there."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
