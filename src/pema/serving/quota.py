"""Quotas of a key: requests per second, tokens and LM heads in rolling windows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pema.serving.policy import Key
from pema.serving.refusal import Refusal
from pema.serving.store import Store

SLICES = 60
"""Parts of a rolling window. Tokens leave the window one part at a time, never early."""

PERIODS = {"minute": 60.0, "day": 86400.0}
"""Seconds of the windows of tokens."""


class Rate:
    """A bucket that fills with `per_second` requests and has a capacity of one second's worth, at least one request.

    Every method but the constructor runs inside a transaction of the store.

    Args:
        store: has the requests that are missing from the bucket.
        key: name of the key.

    Attributes:
        per_second: mean rate; None for no limit.
    """

    def __init__(self, store: Store, key: str, per_second: float | None = None) -> None:
        self._store, self._key = store, key
        self.per_second = per_second

    def take(self, now: float) -> float:
        """Take one request; return 0, or the seconds until there is one (nothing is taken then)."""
        if self.per_second is None:
            return 0.0
        capacity = max(1.0, self.per_second)
        taken, at = next(
            iter(self._store.execute("SELECT taken, at FROM rates WHERE key = ?", (self._key,))), (0.0, now)
        )
        # After a change of the limit more may be taken than the bucket has; a clock may be set back.
        taken = max(0.0, min(taken, capacity) - max(0.0, now - at) * self.per_second)
        over = taken + 1 - capacity
        refused = over > 1e-9
        values = (self._key, taken if refused else taken + 1, now)
        self._store.execute("INSERT OR REPLACE INTO rates VALUES (?, ?, ?)", values)
        return float(over / self.per_second) if refused else 0.0


class Window:
    """A maximum of `most` in any `seconds`; None is no maximum, and what is spent is counted all the same.

    Every method but the constructor runs inside a transaction of the store.

    Args:
        store: has what is spent.
        key: name of the key.
        name: name of the window.

    Attributes:
        seconds: length.
        most: maximum.
    """

    def __init__(self, store: Store, key: str, name: str, seconds: float, most: int | None = None) -> None:
        self._store, self._place = store, (key, name)
        self.seconds, self.most = seconds, most

    def slices(self, now: float) -> list[tuple[float, int]]:
        """Return what is spent as (time at which it leaves the window, amount), the oldest first."""
        rows = self._store.execute(
            "SELECT leaves, amount FROM spent WHERE key = ? AND window = ? AND leaves > ? ORDER BY leaves",
            (*self._place, now),
        )
        latest = self._leaves(now)
        late = sum(amount for leaves, amount in rows if leaves > latest)
        if late:
            # The clock was set back: what was spent later than now is spent now, and leaves after one window.
            self._store.execute("DELETE FROM spent WHERE key = ? AND window = ? AND leaves > ?", (*self._place, latest))
            self._add(late, latest)
            return self.slices(now)
        return [(leaves, amount) for leaves, amount in rows if amount > 0]

    def wait(self, tokens: int, now: float) -> float:
        """Return the seconds until so many tokens fit: 0 if they do, infinity if they never will."""
        if self.most is None:
            return 0.0
        slices = self.slices(now)
        over = sum(amount for _, amount in slices) + tokens - self.most
        if over <= 0:
            return 0.0
        if tokens > self.most:
            return float("inf")
        for leaves, amount in slices:
            over -= amount
            if over <= 0:
                return leaves - now
        return float("inf")

    def spend(self, tokens: int, now: float) -> float:
        """Count tokens; return the time at which they leave the window, for `give`."""
        self._store.execute("DELETE FROM spent WHERE key = ? AND window = ? AND leaves <= ?", (*self._place, now))
        leaves = self._leaves(now)
        self._add(tokens, leaves)
        return leaves

    def give(self, tokens: int, leaves: float) -> None:
        """Take back what `spend` counted, unless it has left the window."""
        self._store.execute(
            "UPDATE spent SET amount = amount - ? WHERE key = ? AND window = ? AND leaves = ?",
            (tokens, *self._place, leaves),
        )

    def _leaves(self, now: float) -> float:
        width = self.seconds / SLICES
        return (now // width + 1) * width + self.seconds

    def _add(self, tokens: int, leaves: float) -> None:
        self._store.execute(
            "INSERT INTO spent VALUES (?, ?, ?, ?) "
            "ON CONFLICT (key, window, leaves) DO UPDATE SET amount = amount + excluded.amount",
            (*self._place, leaves, tokens),
        )


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
    """The quotas of one key; every process that uses the same store counts in the same ones.

    Raises:
        Refusal: from every method but `change`: 503, the store is unavailable.
    """

    def __init__(self, key: Key, store: Store, heads_per_hour: int = 60) -> None:
        self._store = store
        self._rate = Rate(store, key.name)
        self._heads = Window(store, key.name, "heads", 3600.0)
        self._windows = {name: Window(store, key.name, name, seconds) for name, seconds in PERIODS.items()}
        self.change(key, heads_per_hour)

    def change(self, key: Key, heads_per_hour: int) -> None:
        """Set the limits of a policy; what is spent stays spent."""
        self._heads.most = heads_per_hour
        self._windows["minute"].most, self._windows["day"].most = key.tokens_per_minute, key.tokens_per_day
        self._rate.per_second = key.requests_per_second

    def remaining(self) -> list[Remaining]:
        """Return the rest of every quota that has a limit."""
        rests = []
        with self._store.transaction() as now:
            for unit, window in (*(("tokens", window) for window in self._windows.values()), ("heads", self._heads)):
                if window.most is not None:
                    slices = window.slices(now)
                    left = max(0, window.most - sum(amount for _, amount in slices))
                    times = [leaves - now for leaves, _ in slices] or [0.0]
                    rests.append(Remaining(unit, window.seconds, window.most, left, times[0], times[-1]))
        return rests

    def request(self) -> None:
        """Count one request.

        Raises:
            Refusal: 429, requests are too frequent.
        """
        if self._rate.per_second is None:
            return
        with self._store.transaction() as now:
            wait = self._rate.take(now)
        if wait > 0:
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
        with self._store.transaction() as now:
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
            charged = [(window, window.spend(count, now)) for window in self._windows.values()]
        return lambda: self._give(count, charged)

    def _give(self, count: int, charged: Sequence[tuple[Window, float]]) -> None:
        with self._store.transaction():
            for window, leaves in charged:
                window.give(count, leaves)

    def head(self) -> None:
        """Count one download of the LM head, which costs no token and as much as many requests.

        Raises:
            Refusal: 429, it was downloaded too often.
        """
        with self._store.transaction() as now:
            wait = self._heads.wait(1, now)
            if wait == 0:
                self._heads.spend(1, now)
        if wait > 0:
            raise Refusal(
                429,
                "too_many_heads",
                f"This key downloaded the LM head {self._heads.most} times within an hour.",
                "Keep it, or wait as long as Retry-After says.",
                retry_after=wait,
            )
