"""Decoding sessions that clients keep open, under unguessable names; closed if idle or if memory is short."""

from __future__ import annotations

import asyncio
import contextlib
import math
import secrets
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field

from pema.owner.contract import PLM, Session
from pema.owner.wire import WireDtype
from pema.serving.policy import Limits
from pema.serving.refusal import Refusal, session_expired

REMEMBERED = 4096
"""Number of closed sessions whose names are kept, so that a client is told why its session is gone."""


@dataclass(frozen=True)
class Cost:
    """The memory of a session of a PLM.

    Attributes:
        row: bytes per row.
        token: bytes per token of a row, padding included.
    """

    row: float
    token: float

    @classmethod
    def measure(cls, plm: PLM) -> Cost:
        """Measure it on two small sessions."""
        few, many = 1, max(2, min(4, plm.description.max_length - 1))
        held = []
        for length in (few, many):
            session = plm.open_session([[0] * length])
            held.append(session.held_bytes)
            session.close()
        token = (held[1] - held[0]) / (many - few)
        return cls(held[0] - few * token, token)

    def bytes(self, rows: int, width: int) -> int:
        """Return the maximum bytes of a session of so many rows, all of this width."""
        return math.ceil(rows * (self.row + self.token * width))


@dataclass(eq=False)
class Entry:
    """One client's session.

    Attributes:
        name: its name for the client.
        key: name of the API key that opened it; for any other key it does not exist.
        session: the owner's session.
        dtype: precision of its representations on the wire.
        lengths: tokens of each row's context.
        held: its bytes after the last step, or the maximum after the running one.
        used: time of its last use.
        width: tokens of each row, padding included.
        step: number of steps taken.
        request: the last step, and `answer` the answer to it: a repeated step is answered again.
        lock: held while a step runs.
    """

    name: str
    key: str
    session: Session
    dtype: WireDtype
    lengths: list[int]
    held: int
    used: float
    width: int
    step: int = 0
    request: object = None
    answer: bytes = b""
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)


class Sessions:
    """The sessions of one server; used by the event loop's thread only.

    Each key has an equal share of the memory for sessions. It may also use what others leave unused, until they need
    it: a session is closed for another key's only if its own key is above its share.

    Args:
        limits: their number, size and idle time.
        evicted: called with the reason, idle or memory, if a session is closed that its client did not close.
        clock: returns monotonic seconds.
        keys: number of keys that share the memory.
        worker: name of the process, with which the sessions' names begin; empty if it has none.
    """

    def __init__(
        self,
        limits: Limits,
        evicted: Callable[[str], None] = lambda reason: None,
        clock: Callable[[], float] = time.monotonic,
        keys: int = 1,
        worker: str = "",
    ) -> None:
        self._prefix = f"{worker}-" if worker else ""
        self._limits = limits
        self._share = limits.session_bytes / keys
        self._evicted = evicted
        self._clock = clock
        self._live: OrderedDict[str, Entry] = OrderedDict()  # the longest unused first
        self._opening: Counter[str] = Counter()
        self._reserved: Counter[str] = Counter()
        self._gone: OrderedDict[str, tuple[str, str]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._live)

    def change(self, limits: Limits, keys: int) -> None:
        """Set other limits, for the sessions and steps from now on."""
        self._limits, self._share = limits, limits.session_bytes / keys

    @property
    def held(self) -> int:
        """Bytes of all sessions, including those that are being opened."""
        return sum(entry.held for entry in self._live.values()) + self._reserved.total()

    @contextlib.contextmanager
    def place(self, key: str, held: int = 0) -> Iterator[None]:
        """Reserve a place and memory for a session of this key while it is opened.

        Args:
            key: name of the key.
            held: maximum bytes of the session.

        Raises:
            Refusal: 429, the key has its maximum of sessions; 413, the session is larger than all sessions together may
                be; 503, there is no memory for it now.
        """
        self.sweep()
        own = [entry for entry in self._live.values() if entry.key == key]
        if len(own) + self._opening[key] >= self._limits.sessions:
            oldest = min((entry.used for entry in own), default=self._clock())
            raise Refusal(
                429,
                "too_many_sessions",
                f"This key has {self._limits.sessions} live sessions, its maximum.",
                "Close those that are finished (DELETE), or wait until one expires.",
                retry_after=oldest + self._limits.session_idle_seconds - self._clock(),
            )
        self._require_possible(held)
        self._opening[key] += 1
        self._reserved[key] += held
        try:
            if not self._make_room(key, None):
                raise _no_memory()
            yield
        finally:
            self._opening[key] -= 1
            self._reserved[key] -= held

    def add(self, key: str, session: Session, dtype: WireDtype, lengths: list[int], held: int) -> Entry:
        """Add a session that was just opened; the longest unused ones are closed if memory is short.

        Raises:
            Refusal: 413, it is larger than all sessions together may be.
        """
        try:
            self._require_possible(held)
        except Refusal:
            session.close()
            raise
        name = self._prefix + secrets.token_urlsafe(24)
        entry = Entry(name, key, session, dtype, lengths, held, self._clock(), max(lengths))
        self._live[entry.name] = entry
        self._keep(entry)
        return entry

    @contextlib.contextmanager
    def growing(self, entry: Entry, rows: int) -> Iterator[None]:
        """Reserve memory for a step before it is taken.

        Args:
            entry: the session.
            rows: number of its rows after the step.

        Raises:
            Refusal: 413, the session would be larger than all sessions together may be; 503, there is no memory for it
                now. The session is unchanged.
        """
        before = entry.held
        each = before / len(entry.lengths) * (entry.width + 1) / entry.width
        after = math.ceil(each * rows)
        self._require_possible(after)
        entry.held = max(before, after)
        if not self._make_room(entry.key, entry):
            entry.held = before
            raise _no_memory()
        try:
            yield
        except BaseException:
            entry.held = before
            raise

    def find(self, name: str, key: str) -> Entry:
        """Return a live session, and mark it as used.

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
        """Record a step and the answer to it."""
        entry.step += 1
        entry.width += 1
        entry.lengths, entry.held = lengths, held + len(answer)
        entry.request, entry.answer = request, answer
        entry.used = self._clock()
        self._live.move_to_end(entry.name)
        self._keep(entry)

    def _keep(self, entry: Entry) -> None:
        """Make room for a session; if there is none, close it."""
        if not self._make_room(entry.key, entry):
            self._close(entry, "it outgrew the memory for sessions", "memory")

    def _make_room(self, key: str, kept: Entry | None) -> bool:
        """Close the longest unused sessions until the others fit; a session whose step runs stays.

        Sessions of `key` are closed if it is above its share, else those of the key that is furthest above its own.

        Returns:
            Whether they fit.
        """
        while self.held > self._limits.session_bytes:
            held = Counter(self._reserved)
            for entry in self._live.values():
                held[entry.key] += entry.held
            loser = key if held[key] > self._share else held.most_common(1)[0][0]
            closing = (e for e in self._live.values() if e.key == loser and e is not kept and not e.lock.locked())
            victim = next(closing, None)
            if victim is None:
                return False
            self._close(victim, "it made room for others", "memory")
        return True

    def _require_possible(self, held: int) -> None:
        if held > self._limits.session_bytes:
            raise Refusal(
                413,
                "session_too_large",
                f"The session needs {held} bytes, all sessions together have {self._limits.session_bytes}.",
                "Open it with fewer or shorter prompts, or continue with fewer rows.",
            )

    def sweep(self) -> None:
        """Close the sessions that have been idle for too long."""
        before = self._clock() - self._limits.session_idle_seconds
        for entry in [*self._live.values()]:
            if entry.used > before:
                return
            if not entry.lock.locked():
                self._close(entry, f"it was not used for {self._limits.session_idle_seconds:g} seconds", "idle")

    async def delete(self, name: str, key: str) -> None:
        """Close a session of this key, if there is one, after the step that may be running."""
        entry = self._live.get(name)
        if entry is not None and entry.key == key:
            async with entry.lock:
                self.drop(entry)

    async def close_of(self, keys: Collection[str], reason: str) -> None:
        """Close the sessions of these keys, each after the step that may be running."""
        for entry in [entry for entry in self._live.values() if entry.key in keys]:
            async with entry.lock:
                if self.is_live(entry):
                    self._close(entry, reason, None)

    def drop(self, entry: Entry) -> None:
        """Close a session that its client does not need, or that cannot continue."""
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


def _no_memory() -> Refusal:
    message = "The memory for sessions is in use, by running steps or by keys that are within their share."
    return Refusal(503, "no_room", message, "Close sessions that are finished, or try again.", retry_after=1)
