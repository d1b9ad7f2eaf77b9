"""Connections before their first request: how many there are, and how long one may be silent.

The HTTP server sees a connection only after its TLS handshake, and counts it as idle only after its first answer. A
thousand silent connections are visible only where connections are accepted, so they are counted and closed there.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import socket
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

IDLE_SECONDS = 10.0
"""Maximum seconds without a complete request, since a connection was opened or since its last answer."""

BODY_SECONDS = 30.0
"""Maximum seconds in which a request's body arrives."""

Peer = tuple[str, int]
"""Address and port of a client: no two live connections share them."""


@dataclass(eq=False)
class _Open:
    connection: socket.socket
    since: float
    busy: bool = False
    leaving: bool = False


class Connections:
    """The live connections of one server; used by the event loop's thread only.

    Args:
        most: maximum number. One more closes the one that has been silent for longest, or is refused itself if all of
            them are being answered.
        clock: returns monotonic seconds.
    """

    def __init__(self, most: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.most = most
        self._clock = clock
        self._open: OrderedDict[Peer, _Open] = OrderedDict()  # the longest silent first

    def __len__(self) -> int:
        return len(self._open)

    @property
    def overfull(self) -> bool:
        """Whether so many are about to be closed that the next one has to wait."""
        return len(self._open) >= 2 * self.most

    def add(self, peer: Peer, connection: socket.socket) -> bool:
        """Count a connection that was just accepted; return False if there is no place for it."""
        if sum(not entry.leaving for entry in self._open.values()) >= self.most:
            silent = next((e for e in self._open.values() if not e.busy and not e.leaving), None)
            if silent is None:
                return False
            _shut(silent)
        self._open[peer] = _Open(connection, self._clock())
        return True

    def resize(self, most: int) -> None:
        """Set another maximum, and raise the process's limit of open files as far as the system allows."""
        self.most = most
        with contextlib.suppress(ImportError, OSError, ValueError):
            import resource

            files = 2 * most + 256  # each connection is a file, and so many may be about to be closed
            soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
            wanted = files if hard == resource.RLIM_INFINITY else min(files, hard)
            if soft != resource.RLIM_INFINITY and soft < wanted:
                resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))

    def forget(self, peer: Peer) -> None:
        """Note that a connection is closed."""
        self._open.pop(peer, None)

    def begin(self, peer: Peer | None) -> None:
        """Note that a complete request arrived on this connection."""
        if entry := self._open.get(peer) if peer else None:
            entry.busy = True

    def end(self, peer: Peer | None) -> None:
        """Note that the request is answered."""
        if peer and (entry := self._open.get(peer)):
            entry.busy, entry.since = False, self._clock()
            self._open.move_to_end(peer)

    def drop(self, peer: Peer | None) -> None:
        """Close a connection immediately."""
        if entry := self._open.get(peer) if peer else None:
            _shut(entry)

    def sweep(self) -> None:
        """Close the connections that have been silent for too long."""
        before = self._clock() - IDLE_SECONDS
        for entry in self._open.values():
            if not entry.busy and not entry.leaving and entry.since < before:
                _shut(entry)

    async def watch(self) -> None:
        """Sweep until cancelled."""
        while True:
            await asyncio.sleep(1.0)
            self.sweep()


class Listener(socket.socket):
    """A listening socket that counts the connections that it accepts.

    Attributes:
        connections: counts them; None before the server runs.
    """

    connections: Connections | None = None

    def accept(self) -> tuple[socket.socket, Any]:
        """See `socket.socket.accept`; for a refused connection, raise what asyncio takes for a client that has left."""
        connections = self.connections
        if connections is not None and connections.overfull:
            raise BlockingIOError
        plain, address = super().accept()
        peer = (str(address[0]), int(address[1]))
        # asyncio sets TCP_NODELAY only if the protocol is given.
        accepted = _Accepted(self.family, self.type, self.proto, fileno=plain.detach())
        if connections is not None:
            if not connections.add(peer, accepted):
                accepted.close()
                raise ConnectionAbortedError
            accepted.closed = lambda: connections.forget(peer)
        return accepted, address


class _Accepted(socket.socket):
    closed: Callable[[], None] = staticmethod(lambda: None)

    def close(self) -> None:
        self.closed()
        super().close()


def is_loopback(host: str) -> bool:
    """Whether a name or an address is that of the loopback."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def host_of(header: str) -> str:
    """Return the host of a Host header, without its port."""
    if header.startswith("["):
        return header[1:].partition("]")[0]
    return header.rpartition(":")[0] if header.count(":") == 1 else header


def _shut(entry: _Open) -> None:
    """Shut down both directions: this also ends a TLS handshake in progress."""
    entry.leaving = True
    with contextlib.suppress(OSError):
        entry.connection.shutdown(socket.SHUT_RDWR)
