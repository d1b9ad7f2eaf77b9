"""Notes and progress of a process elsewhere, which another process prints: on a cluster, that of the user's command."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from typing import Any

from pema import console

Event = tuple[Any, ...]
"""What happened in one call of `pema.console`: ("note", text), ("begin", description, total, unit), ("advance", n,
note, earlier) or ("end",)."""

SECONDS = 0.25
"""Time between two messages about progress."""


class Relay:
    """The sender: `pema.console` tells it what it would print, once it is given to `console.redirect`."""

    def __init__(self, send: Callable[[Sequence[Event]], None]) -> None:
        """Prepare a relay.

        Args:
            send: sends events to the process that prints them; it is called a few times a second at most, apart from
                notes and the beginnings and ends of bars.
        """
        self._send, self._sent = send, 0.0
        self._waiting: dict[bool, tuple[float, str]] = {}

    def __call__(self, kind: str, *values: Any) -> None:  # noqa: ANN401
        """Send an event, now or together with the next ones."""
        if kind == "advance":
            n, note, earlier = values
            self._waiting[earlier] = self._waiting.get(earlier, (0.0, ""))[0] + n, note
            if time.monotonic() - self._sent < SECONDS:
                return
        events: list[Event] = [("advance", n, note, earlier) for earlier, (n, note) in self._waiting.items()]
        self._waiting.clear()
        if kind != "advance":
            events.append((kind, *values))
        self._send(events)
        self._sent = time.monotonic()


class Repeater:
    """The receiver, as a context: it prints events as if they happened here; bars that are open at its end vanish."""

    def __init__(self) -> None:
        self._bars: list[tuple[contextlib.ExitStack, Callable[..., None]]] = []

    def __enter__(self) -> Repeater:
        return self

    def __exit__(self, *_: object) -> None:
        while self._bars:
            self._bars.pop()[0].close()

    def __call__(self, events: Sequence[Event]) -> None:
        """Print what another process told."""
        for kind, *values in events:
            if kind == "note":
                console.note(*values)
            elif kind == "begin":
                bar = contextlib.ExitStack()
                self._bars.append((bar, bar.enter_context(console.progress(*values))))
            elif kind == "advance":
                n, note, earlier = values
                self._bars[-1][1](n, note, earlier=earlier)
            else:
                self._bars.pop()[0].close()
