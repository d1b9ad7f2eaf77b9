"""How much a key may ask for: requests a second, tokens in a rolling window."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

from pema.serving.policy import Key
from pema.serving.refusal import Refusal

SLICES = 60
"""Parts of a rolling window; tokens leave it a part at a time, never early."""


class Rate:
    """A bucket that fills with `per_second` requests and holds a second's worth, at least one."""

    def __init__(self, per_second: float, now: float) -> None:
        self.per_second = per_second
        self.capacity = max(1.0, per_second)
        self._level = self.capacity
        self._at = now

    def take(self, now: float) -> float:
        """Take one request; 0, or the seconds after which there will be one (and nothing is taken)."""
        self._level = min(self.capacity, self._level + (now - self._at) * self.per_second)
        self._at = now
        if self._level < 1 - 1e-9:
            return (1 - self._level) / self.per_second
        self._level -= 1
        return 0.0


class Window:
    """At most `most` tokens in any `seconds`."""

    def __init__(self, most: int, seconds: float) -> None:
        self.most = most
        self.seconds = seconds
        self._slices: deque[list[float]] = deque()  # [leaves at, tokens], the oldest first
        self._held = 0.0

    def wait(self, tokens: int, now: float) -> float:
        """Seconds until so many tokens fit; 0 where they do, infinite where they never will."""
        while self._slices and self._slices[0][0] <= now:
            self._held -= self._slices.popleft()[1]
        over = self._held + tokens - self.most
        if over <= 0:
            return 0.0
        for leaves, held in self._slices:
            over -= held
            if over <= 0:
                return leaves - now
        return float("inf")

    def spend(self, tokens: int, now: float) -> Callable[[], None]:
        """Count tokens against the window; what is returned takes them back."""
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


class Quota:
    """What one key has left. Held in memory: a server that starts again starts with full quotas."""

    def __init__(self, key: Key, clock: Callable[[], float] = time.monotonic, *, heads_per_hour: int = 60) -> None:
        self._clock = clock
        self._heads = Window(heads_per_hour, 3600.0)
        self._rate = Rate(key.requests_per_second, clock()) if key.requests_per_second else None
        windows = ((key.tokens_per_minute, 60.0, "minute"), (key.tokens_per_day, 86400.0, "day"))
        self._windows = [(Window(most, seconds), name) for most, seconds, name in windows if most]

    def request(self) -> None:
        """Count one request.

        Raises:
            Refusal: 429, they come too fast.
        """
        wait = self._rate.take(self._clock()) if self._rate else 0.0
        if self._rate is not None and wait > 0:
            raise Refusal(
                429,
                "too_many_requests",
                f"This key may send {self._rate.per_second:g} requests a second.",
                "Send fewer, or wait as long as Retry-After says.",
                retry_after=wait,
            )

    def tokens(self, count: int) -> Callable[[], None]:
        """Count tokens that are asked for, all of them or none; what is returned takes them back.

        Raises:
            Refusal: 429, they do not fit yet; 413, they never will.
        """
        now = self._clock()
        for window, name in self._windows:
            wait = window.wait(count, now)
            if wait == float("inf"):
                raise Refusal(
                    413,
                    "larger_than_quota",
                    f"{count} tokens are asked for, this key has {window.most} a {name}.",
                    "Ask for fewer at a time.",
                )
            if wait > 0:
                raise Refusal(
                    429,
                    "quota_spent",
                    f"This key has {window.most} tokens a {name}; {count} more do not fit yet.",
                    "Wait as long as Retry-After says.",
                    retry_after=wait,
                )
        refunds = [window.spend(count, now) for window, _ in self._windows]

        def refund() -> None:
            for each in refunds:
                each()

        return refund

    def head(self) -> None:
        """Count one handing out of the LM head, which costs no token and as much as many requests.

        Raises:
            Refusal: 429, it was handed out too often.
        """
        now = self._clock()
        wait = self._heads.wait(1, now)
        if wait > 0:
            raise Refusal(
                429,
                "too_many_heads",
                f"This key has had the LM head {self._heads.most} times within an hour.",
                "Keep it, or wait as long as Retry-After says.",
                retry_after=wait,
            )
        self._heads.spend(1, now)
