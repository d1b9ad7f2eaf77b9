"""Usage per key and day, for the PLM owner: counted for the metrics, and one line in the log per key and day."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from datetime import UTC, date, datetime

logger = logging.getLogger("pema.serving.usage")


def today() -> date:
    """Return the current day in UTC."""
    return datetime.now(UTC).date()


class Usage:
    """Requests and tokens of each key on the current day (UTC).

    When the day has ended, and when the server stops, each key's sums are logged; the lines of one key and day add up.

    Args:
        day: returns the current day.
    """

    def __init__(self, day: Callable[[], date] = today) -> None:
        self._today = day
        self._day = day()
        self._requests: Counter[str] = Counter()
        self._tokens: Counter[str] = Counter()

    def count(self, key: str, tokens: int) -> None:
        """Count a request of this key."""
        self.roll()
        self._requests[key] += 1
        self._tokens[key] += tokens

    def roll(self) -> None:
        """Log the sums if their day has ended."""
        if self._today() != self._day:
            self.close()

    def close(self) -> None:
        """Log the sums, and start new ones."""
        for key, requests in sorted(self._requests.items()):
            fields = {"key": key, "day": self._day.isoformat(), "requests": requests, "tokens": self._tokens[key]}
            logger.info("usage", extra={"fields": fields})
        self._requests.clear()
        self._tokens.clear()
        self._day = self._today()
