"""The process of the server: its address, TLS, signals and end."""

from __future__ import annotations

import logging
import os
import signal
import socket
import ssl
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import uvicorn
from starlette.types import ASGIApp

from pema.console import stdout
from pema.errors import ConfigError
from pema.serving.connections import Connections, Listener, is_loopback
from pema.serving.policy import Policy
from pema.serving.state import State

logger = logging.getLogger(__name__)
DRAIN_SECONDS = 60.0
"""Maximum seconds for requests in flight after the server is told to stop."""


@dataclass(frozen=True)
class Address:
    """The address of a server.

    Attributes:
        host: name or address.
        port: 0 selects a free one.
        certificate: PEM file for TLS, with `private_key`; None for plain HTTP.
        private_key: PEM file.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    certificate: Path | None = None
    private_key: Path | None = None

    def check(self, policy: Policy, *, insecure: bool) -> None:
        """Refuse to listen on a network without keys and TLS.

        Args:
            policy: has the keys.
            insecure: whether to listen without them.

        Raises:
            ConfigError: they are missing, or the certificate is invalid; names what is missing.
        """
        if (self.certificate is None) != (self.private_key is None):
            raise ConfigError("--tls-cert and --tls-key go together: give both files.")
        if self.certificate is not None and self.private_key is not None:
            try:
                ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(self.certificate, self.private_key)
            except (OSError, ssl.SSLError) as error:
                raise ConfigError(
                    f"the certificate {self.certificate} with the key {self.private_key} cannot be used: {error}."
                ) from error
        if insecure or is_loopback(self.host):
            return
        missing = [
            what
            for what, there in (
                ("a policy with keys (--policy)", policy.keys),
                ("TLS (--tls-cert, --tls-key)", self.certificate),
            )
            if not there
        ]
        if missing:
            raise ConfigError(
                f"{self.host} can be reached from other machines and lacks {' and '.join(missing)}: add it, listen on "
                "127.0.0.1, or say --insecure-network if something else guards this network."
            )

    def local_only(self, policy: Policy) -> bool:
        """Whether only programs of this machine may send requests: it listens on the loopback without keys."""
        return is_loopback(self.host) and not policy.keys

    def listen(self) -> Listener:
        """Open the listening socket.

        Raises:
            ConfigError: the address is not available.
        """
        family = socket.AF_INET6 if ":" in self.host else socket.AF_INET
        # asyncio sets TCP_NODELAY only if the protocol is given; without it each answer is delayed by 40 ms.
        listener = Listener(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        try:
            if os.name == "posix":
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind((self.host, self.port))
            # From here on clients may connect; they are answered with 503 while the PLM is being loaded.
            listener.listen(2048)
        except (OSError, OverflowError) as error:
            listener.close()
            raise ConfigError(
                f"cannot listen on {self.host} port {self.port}: {error}. Choose another --host or --port."
            ) from error
        return listener

    def url(self, listener: socket.socket) -> str:
        """Return the URL of the server."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{'http' if self.certificate is None else 'https'}://{host}:{listener.getsockname()[1]}"


class _Server(uvicorn.Server):
    """A server that stops on SIGTERM and SIGINT after the requests in flight; a second signal ends it at once."""

    def __init__(self, config: uvicorn.Config, state: State) -> None:
        super().__init__(config)
        self._state = state
        self._deadline = float("inf")

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        # The base class raises the signal again at the end, and the exit code would be the signal's.
        if self._state.draining:
            # The PLM's thread cannot be stopped, and an end of the interpreter under it is an abort.
            logger.warning("stopped at once, with %d requests unanswered", self._state.in_flight)
            os._exit(128 + sig)
        self._state.draining = True
        self._deadline = time.monotonic() + DRAIN_SECONDS

    async def on_tick(self, counter: int) -> bool:
        finished = self._state.draining and not self._state.in_flight
        if finished or self._state.failure is not None or time.monotonic() > self._deadline:
            self.should_exit = True
        return await super().on_tick(counter)


def configuration(app: ASGIApp, address: Address) -> uvicorn.Config:
    """Return the configuration of uvicorn."""
    return uvicorn.Config(
        app,
        loop="asyncio",
        http="h11",
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_graceful_shutdown=5,
        ssl_certfile=address.certificate,
        ssl_keyfile=address.private_key,
    )


def serve(
    app: ASGIApp,
    state: State,
    reread: Callable[[], None],
    address: Address,
    listener: Listener,
    connections: Connections,
    name: str,
) -> None:
    """Print the address at which `name` is served, then run the server; see `run`.

    Raises:
        PemaError: the PLM could not be loaded.
    """
    listener.connections = connections
    connections.resize(connections.most)
    stdout.print(f"serving {name} at {address.url(listener)}", markup=False)
    run(app, state, reread, listener, address)


def run(
    app: ASGIApp,
    state: State,
    reread: Callable[[], None],
    listener: socket.socket,
    address: Address = Address(),
) -> None:
    """Answer requests at a listening socket until SIGTERM or SIGINT.

    Args:
        app: the application.
        state: its state.
        reread: called on SIGHUP.
        listener: the socket.
        address: has the certificate for TLS, if there is one.

    Raises:
        PemaError: the PLM could not be loaded.
    """
    server = _Server(configuration(app, address), state)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, server.handle_exit)
    if hasattr(signal, "SIGHUP"):
        signal.signal(signal.SIGHUP, lambda *_: reread())
    server.run(sockets=[listener])
    if state.failure is not None:
        raise state.failure
    if state.stuck:
        # A thread that loads or runs the PLM cannot be stopped, and an end of the interpreter under it is an abort.
        os._exit(0 if state.loading else 1)
