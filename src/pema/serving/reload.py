"""Rereading the policy file while the server runs, on SIGHUP.

On a signal and not when the file changes: a policy that an editor has half written can be valid, and would lock out
the keys that are not in the file yet. A signal to one process reaches all that share its store, which counts them.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from pathlib import Path

from pema.errors import ConfigError, PemaError
from pema.serving.connections import Connections
from pema.serving.lifecycle import Lifecycle
from pema.serving.policy import Policy, reread
from pema.serving.refusal import POLICY_CHANGED, Refusal
from pema.serving.service import Service

logger = logging.getLogger(__name__)
_SECONDS = 0.2


class Reloader:
    """Rereads the policy when asked to.

    A policy is read and checked as a whole, its secrets included, before any of it is in force. If it is invalid, the
    old one stays in force and the log says why.

    Args:
        path: the policy file; None if the server was started without one.
        lifecycle: has the service, once it is loaded.
        connections: of the process.
        number: the request to reread that the policy in force follows, of those in the store; None if that is unknown.
    """

    def __init__(
        self, path: Path | None, lifecycle: Lifecycle, connections: Connections, number: int | None = None
    ) -> None:
        self._path, self._lifecycle, self._connections = path, lifecycle, connections
        self._requested = False
        self._number = number

    def request(self) -> None:
        """Ask for the policy to be reread soon; safe in a signal handler."""
        self._requested = True

    async def watch(self) -> None:
        """Reread the policy whenever that was requested, until cancelled."""
        while True:
            await asyncio.sleep(_SECONDS)
            # While the PLM is being loaded, the request waits.
            service = self._lifecycle.loaded
            if service is not None:
                with contextlib.suppress(Refusal):  # the store is unavailable, which is logged; the next time
                    await self._watch(service)

    async def _watch(self, service: Service) -> None:
        store = service.store
        if self._number is None:
            # Another process may have requested it after the policy was read here, and before the store was opened.
            shared = self._path is not None and store.path is not None
            self._number = -1 if shared else store.rereads()
        if self._requested:
            store.request_reread()
            self._requested = False
        number = store.rereads()
        if number != self._number:
            self._number = number
            await self._reread(service)

    async def _reread(self, service: Service) -> None:
        try:
            rules = await asyncio.to_thread(lambda: service.prepare(self._read(service)))
        except Exception as error:  # the server continues in any case
            why = str(error) if isinstance(error, PemaError) else type(error).__name__
            logger.error("the policy was not reread, the old one stays in force", extra={"fields": {"why": why}})
            return
        before = {key.name: key for key in service.policy.keys}
        after = {key.name: key for key in rules.policy.keys}
        # Accounts change at once, between two requests; then the sessions of keys that may not have them any more end.
        ending = service.apply(rules)
        self._connections.resize(rules.policy.limits.connections)
        await service.sessions.close_of(ending, POLICY_CHANGED)
        fields = {
            "added": sorted(after.keys() - before.keys()),
            "removed": sorted(before.keys() - after.keys()),
            "changed": sorted(name for name in after.keys() & before.keys() if after[name] != before[name]),
        }
        logger.info("the policy was reread", extra={"fields": fields})

    def _read(self, service: Service) -> Policy:
        if self._path is None:
            raise ConfigError("the server was started without a policy file (--policy): start it again with one.")
        return reread(self._path, service.policy)
