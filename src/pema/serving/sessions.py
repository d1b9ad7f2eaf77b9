"""Decoding sessions that clients hold open: found by an unguessable name, closed when idle or when room is short."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from pema.owner.contract import Session
from pema.owner.wire import WireDtype
from pema.serving.policy import Limits
from pema.serving.refusal import Refusal, session_expired

REMEMBERED = 4096
"""Names of closed sessions that are kept, so that a client hears why its session is gone."""


@dataclass(eq=False)
class Entry:
    """One client's session.

    Attributes:
        name: what the client calls it by.
        key: name of the API key that opened it; for any other key it does not exist.
        session: the owner's session.
        dtype: precision of its representations on the wire.
        lengths: tokens of each row's context.
        held: what the session holds, in bytes, as it said after its last step.
        used: when it was used last.
        step: steps that it has taken.
        request: what the last step asked for, and `answer` what it was given: a repeated step is answered again.
        lock: held while a step runs.
    """

    name: str
    key: str
    session: Session
    dtype: WireDtype
    lengths: list[int]
    held: int
    used: float
    step: int = 0
    request: object = None
    answer: bytes = b""
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)


class Sessions:
    """The sessions of one server; touched by the event loop's thread only.

    Args:
        limits: how many, how large, how long unused.
        evicted: told why a session was closed that its client had not closed: idle or memory.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        limits: Limits,
        evicted: Callable[[str], None] = lambda reason: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._limits = limits
        self._evicted = evicted
        self._clock = clock
        self._live: OrderedDict[str, Entry] = OrderedDict()  # the longest unused first
        self._opening: Counter[str] = Counter()
        self._gone: OrderedDict[str, tuple[str, str]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._live)

    @property
    def held(self) -> int:
        """What all sessions hold."""
        return sum(entry.held for entry in self._live.values())

    @contextlib.contextmanager
    def place(self, key: str) -> Iterator[None]:
        """Keep a place for a session of this key while it is opened.

        Raises:
            Refusal: 429, the key has as many sessions as it may.
        """
        self.sweep()
        own = [entry for entry in self._live.values() if entry.key == key]
        if len(own) + self._opening[key] >= self._limits.sessions:
            oldest = min((entry.used for entry in own), default=self._clock())
            raise Refusal(
                429,
                "too_many_sessions",
                f"This key has {self._limits.sessions} live sessions, as many as it may.",
                "Close those that are finished (DELETE), or wait until one expires.",
                retry_after=oldest + self._limits.session_idle_seconds - self._clock(),
            )
        self._opening[key] += 1
        try:
            yield
        finally:
            self._opening[key] -= 1

    def add(self, key: str, session: Session, dtype: WireDtype, lengths: list[int], held: int) -> Entry:
        """Take in a session that was just opened; longer unused ones make room for it.

        Raises:
            Refusal: 413, it alone is larger than all sessions may be together.
        """
        if held > self._limits.session_bytes:
            session.close()
            raise Refusal(
                413,
                "session_too_large",
                f"The session needs {held} bytes, all sessions together have {self._limits.session_bytes}.",
                "Open it with fewer or shorter prompts.",
            )
        entry = Entry(secrets.token_urlsafe(24), key, session, dtype, lengths, held, self._clock())
        self._live[entry.name] = entry
        self.make_room(entry)
        return entry

    def find(self, name: str, key: str) -> Entry:
        """A live session, which counts as used from now on.

        Raises:
            Refusal: 410, it was closed; 404, this key never had it.
        """
        self.sweep()
        entry = self._live.get(name)
        if entry is not None and entry.key == key:
            entry.used = self._clock()
            self._live.move_to_end(name)
            return entry
        owner, reason = self._gone.get(name, ("", ""))
        if owner == key:
            raise session_expired(reason)
        raise Refusal(404, "unknown_session", "There is no such session.", "Open one with POST /v1/sessions.")

    def stepped(self, entry: Entry, lengths: list[int], held: int, request: object, answer: bytes) -> None:
        """Note a step that was taken, and what it was answered with."""
        entry.step += 1
        entry.lengths, entry.held = lengths, held
        entry.request, entry.answer = request, answer
        entry.used = self._clock()
        self._live.move_to_end(entry.name)
        self.make_room(entry)

    def make_room(self, kept: Entry) -> None:
        """Close the longest unused sessions until the rest fits; a session in the middle of a step stays."""
        for entry in [*self._live.values()]:
            if self.held <= self._limits.session_bytes:
                return
            if entry is not kept and not entry.lock.locked():
                self._close(entry, "it made room for others", "memory")
        if self.held > self._limits.session_bytes:
            self._close(kept, "it outgrew the memory for sessions", "memory")

    def sweep(self) -> None:
        """Close what has been idle for too long."""
        before = self._clock() - self._limits.session_idle_seconds
        for entry in [*self._live.values()]:
            if entry.used > before:
                return
            if not entry.lock.locked():
                self._close(entry, f"it was not used for {self._limits.session_idle_seconds:g} seconds", "idle")

    async def delete(self, name: str, key: str) -> None:
        """Close a session of this key, behind the step that may be running; nothing happens where there is none."""
        entry = self._live.get(name)
        if entry is not None and entry.key == key:
            async with entry.lock:
                self.drop(entry)

    def drop(self, entry: Entry) -> None:
        """Close a session that its client does not need, or that cannot go on."""
        if self.is_live(entry):
            self._close(entry, "it was deleted, or a step of it failed", None)

    def close_all(self) -> None:
        """Close every session."""
        for entry in [*self._live.values()]:
            self._close(entry, "the server stops", None)

    def is_live(self, entry: Entry) -> bool:
        """Whether the session is still open."""
        return self._live.get(entry.name) is entry

    def _close(self, entry: Entry, reason: str, eviction: str | None) -> None:
        del self._live[entry.name]
        self._gone[entry.name] = (entry.key, reason)
        if len(self._gone) > REMEMBERED:
            self._gone.popitem(last=False)
        entry.session.close()
        if eviction is not None:
            self._evicted(eviction)
