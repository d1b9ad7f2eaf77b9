"""The life cycle of a server: loading, ready, draining."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future

from transformers.utils.logging import disable_progress_bar

from pema.errors import PemaError
from pema.serving.refusal import draining, loading
from pema.serving.service import Service
from pema.serving.state import State
from pema.serving.usage import Usage

logger = logging.getLogger(__name__)
CLOSE_SECONDS = 10.0
"""Maximum seconds for which an abandoned call of the PLM keeps the process from ending."""


REPORT_SECONDS = 2.0
"""Seconds between two reports to the other processes of the service."""

LARGE_BYTES = 1 << 26
"""Pending bytes after which freed memory is returned to the system."""


class Lifecycle(State):
    """The state of a server, which loads the service outside the event loop.

    Args:
        load: makes the service; runs in a thread, for it can take minutes.
    """

    def __init__(self, load: Callable[[], Service], usage: Usage) -> None:
        super().__init__()
        self._load = load
        self._usage = usage
        self._service: Service | None = None

    async def run(self) -> None:
        """Load the service, then close idle sessions until cancelled."""
        loaded: Future[Service] = Future()

        def load() -> None:
            loaded.set_running_or_notify_cancel()
            disable_progress_bar()  # the log is JSON
            try:
                loaded.set_result(self._load())
            except BaseException as error:
                loaded.set_exception(error)

        # A daemon thread, so that a server that is told to stop while it loads stops at once.
        threading.Thread(target=load, name="pema-loading", daemon=True).start()
        try:
            self._service = service = await asyncio.wrap_future(loaded)
        except Exception as error:
            self.failure = error
            return
        large, reported = False, time.monotonic()
        while True:
            await asyncio.sleep(min(1.0, service.policy.limits.session_idle_seconds / 4))
            service.sessions.sweep()
            self._usage.roll()
            if time.monotonic() - reported >= REPORT_SECONDS:
                reported = time.monotonic()
                _report(service)
            pending = service.pending_bytes
            large = large or pending > LARGE_BYTES
            if large and not pending:
                large = False
                await asyncio.to_thread(_give_back)

    def service(self) -> Service:
        """Return the service, if requests may be sent to it.

        Raises:
            Refusal: 503, it is loading or about to stop.
        """
        if self.draining:
            raise draining()
        if self._service is None:
            raise loading()
        return self._service

    @property
    def loaded(self) -> Service | None:
        """The service; None while it is being loaded, or if that failed."""
        return self._service

    @property
    def loading(self) -> bool:
        """Whether the service is still being loaded."""
        return self._service is None and self.failure is None

    @property
    def stuck(self) -> bool:
        """Whether a thread runs that cannot be stopped: one that loads, or one inside a call of the PLM."""
        return self.loading or (self._service is not None and self._service.batcher.alive)

    def healthy(self) -> bool:
        """Whether the server is ready, or can become so."""
        return self.failure is None and (self._service is None or self._service.batcher.alive)

    async def close(self) -> None:
        """Finish the waiting requests and free everything."""
        self.draining = True
        self._usage.close()
        if self._service is not None:
            await asyncio.to_thread(self._service.batcher.close, CLOSE_SECONDS)
            self._service.close()


def _report(service: Service) -> None:
    try:
        service.report()
    except PemaError as error:
        logger.error("the service has no common state", extra={"fields": {"why": str(error)}})


def _give_back() -> None:
    """Return freed memory to the system; the C library would keep it, because large answers leave gaps in it."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
