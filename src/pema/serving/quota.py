"""Quotas of a key: requests per second, tokens and LM heads in rolling windows."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from pema.serving.policy import Key
from pema.serving.refusal import Refusal

SLICES = 60
"""Parts of a rolling window. Tokens leave the window one part at a time, never early."""

PERIODS = {"minute": 60.0, "day": 86400.0}
"""Seconds of the windows of tokens."""


class Rate:
    """A bucket that fills with `per_second` requests and has a capacity of one second's worth, at least one request."""

    def __init__(self, per_second: float, now: float) -> None:
        self.per_second = per_second
        self.capacity = max(1.0, per_second)
        self._level = self.capacity
        self._at = now

    def take(self, now: float) -> float:
        """Take one request; return 0, or the seconds until there is one (nothing is taken then)."""
        self._fill(now)
        if self._level < 1 - 1e-9:
            return (1 - self._level) / self.per_second
        self._level -= 1
        return 0.0

    def change(self, per_second: float, now: float) -> None:
        """Set another rate; requests already taken stay taken."""
        self._fill(now)
        taken = self.capacity - self._level
        self.per_second, self.capacity = per_second, max(1.0, per_second)
        self._level = max(0.0, self.capacity - taken)

    def _fill(self, now: float) -> None:
        self._level = min(self.capacity, self._level + (now - self._at) * self.per_second)
        self._at = now


class Window:
    """A maximum of `most` in any `seconds`; None is no maximum, and what is spent is counted all the same."""

    def __init__(self, most: int | None, seconds: float) -> None:
        self.most = most
        self.seconds = seconds
        self._slices: deque[list[float]] = deque()  # [leaves at, tokens], the oldest first
        self._held = 0.0

    def spent(self, now: float) -> int:
        """Return how much the window contains."""
        self._drop(now)
        return int(self._held)

    def renewal(self, now: float) -> tuple[float, float]:
        """Return the seconds until the first part of what is spent leaves the window, and until all of it has left."""
        self._drop(now)
        times = [leaves - now for leaves, held in self._slices if held > 0]
        return (times[0], times[-1]) if times else (0.0, 0.0)

    def wait(self, tokens: int, now: float) -> float:
        """Return the seconds until so many tokens fit: 0 if they do, infinity if they never will."""
        self._drop(now)
        if self.most is None:
            return 0.0
        over = self._held + tokens - self.most
        if over <= 0:
            return 0.0
        if tokens > self.most:
            return float("inf")
        for leaves, held in self._slices:
            over -= held
            if over <= 0:
                return leaves - now
        return float("inf")

    def spend(self, tokens: int, now: float) -> Callable[[], None]:
        """Count tokens; return a function that takes them back."""
        width = self.seconds / SLICES
        leaves = (now // width + 1) * width + self.seconds
        if not self._slices or self._slices[-1][0] < leaves:
            self._slices.append([leaves, 0.0])
        part = self._slices[-1]
        part[1] += tokens
        self._held += tokens

        def refund() -> None:
            part[1] -= tokens
            if any(other is part for other in self._slices):
                self._held -= tokens

        return refund

    def save(self, now: float) -> list[list[float]]:
        """Return what is spent as [seconds until it leaves, tokens], the oldest first."""
        self._drop(now)
        return [[leaves - now, tokens] for leaves, tokens in self._slices if tokens > 0]

    def restore(self, spent: list[list[float]], passed: float, now: float) -> None:
        """Count what `save` returned `passed` seconds ago."""
        for remaining, tokens in spent:
            if remaining > passed:
                # A clock that was set back cannot make it stay longer than a window.
                self._slices.append([now + min(remaining - passed, self.seconds * (1 + 1 / SLICES)), tokens])
                self._held += tokens

    def _drop(self, now: float) -> None:
        while self._slices and self._slices[0][0] <= now:
            self._held -= self._slices.popleft()[1]


@dataclass(frozen=True)
class Remaining:
    """The rest of one quota.

    Attributes:
        unit: what is counted, tokens or heads.
        seconds: length of the rolling window.
        limit: maximum in the window.
        left: what may be spent now.
        more_in: seconds until more may be spent; 0 if nothing is spent.
        full_in: seconds until the whole quota may be spent again.
    """

    unit: str
    seconds: float
    limit: int
    left: int
    more_in: float
    full_in: float


class Quota:
    """The quotas of one key, in memory; `save` and `restore` carry them over a restart of the server."""

    def __init__(self, key: Key, clock: Callable[[], float] = time.monotonic, *, heads_per_hour: int = 60) -> None:
        self._clock = clock
        self._heads = Window(heads_per_hour, 3600.0)
        self._rate: Rate | None = None
        self._windows = {name: Window(None, seconds) for name, seconds in PERIODS.items()}
        self.change(key, heads_per_hour)

    def change(self, key: Key, heads_per_hour: int) -> None:
        """Set the limits of a policy; what is spent stays spent."""
        self._heads.most = heads_per_hour
        self._windows["minute"].most, self._windows["day"].most = key.tokens_per_minute, key.tokens_per_day
        if key.requests_per_second is None:
            self._rate = None
        elif self._rate is None:
            self._rate = Rate(key.requests_per_second, self._clock())
        else:
            self._rate.change(key.requests_per_second, self._clock())

    def remaining(self) -> list[Remaining]:
        """Return the rest of every quota that has a limit."""
        now, rests = self._clock(), []
        for unit, window in (*(("tokens", window) for window in self._windows.values()), ("heads", self._heads)):
            if window.most is not None:
                left = max(0, window.most - window.spent(now))
                rests.append(Remaining(unit, window.seconds, window.most, left, *window.renewal(now)))
        return rests

    def save(self) -> dict[str, list[list[float]]]:
        """Return what is spent in each window; see `Window.save`."""
        now = self._clock()
        return {name: window.save(now) for name, window in self._saved().items()}

    def restore(self, spent: Mapping[str, list[list[float]]], passed: float) -> None:
        """Count what `save` returned `passed` seconds ago."""
        now = self._clock()
        for name, window in self._saved().items():
            window.restore(spent.get(name, []), passed, now)

    def _saved(self) -> dict[str, Window]:
        return self._windows | {"heads": self._heads}

    def request(self) -> None:
        """Count one request.

        Raises:
            Refusal: 429, requests are too frequent.
        """
        wait = self._rate.take(self._clock()) if self._rate else 0.0
        if self._rate is not None and wait > 0:
            raise Refusal(
                429,
                "too_many_requests",
                f"This key may send {self._rate.per_second:g} requests per second.",
                "Send fewer, or wait as long as Retry-After says.",
                retry_after=wait,
            )

    def tokens(self, count: int) -> Callable[[], None]:
        """Count requested tokens, all of them or none; return a function that takes them back.

        Raises:
            Refusal: 429, they do not fit yet; 413, they never will.
        """
        now = self._clock()
        for name, window in self._windows.items():
            wait = window.wait(count, now)
            if wait == float("inf"):
                raise Refusal(
                    413,
                    "larger_than_quota",
                    f"{count} tokens are requested, the quota of this key is {window.most} tokens per {name}.",
                    "Request fewer at a time.",
                )
            if wait > 0:
                raise Refusal(
                    429,
                    "quota_spent",
                    f"The quota of this key is {window.most} tokens per {name}; {count} more do not fit yet.",
                    "Wait as long as Retry-After says; GET /v1/plm shows what is left.",
                    retry_after=wait,
                )
        refunds = [window.spend(count, now) for window in self._windows.values()]

        def refund() -> None:
            for each in refunds:
                each()

        return refund

    def head(self) -> None:
        """Count one download of the LM head, which costs no token and as much as many requests.

        Raises:
            Refusal: 429, it was downloaded too often.
        """
        now = self._clock()
        wait = self._heads.wait(1, now)
        if wait > 0:
            raise Refusal(
                429,
                "too_many_heads",
                f"This key downloaded the LM head {self._heads.most} times within an hour.",
                "Keep it, or wait as long as Retry-After says.",
                retry_after=wait,
            )
        self._heads.spend(1, now)
