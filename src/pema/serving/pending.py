"""Pending bytes of a key: bodies that arrive, and answers that are not read yet."""

from __future__ import annotations

from collections.abc import Callable

from pema.serving.refusal import Refusal


class PendingBytes:
    """The bytes of one key.

    Attributes:
        most: maximum of them; the first request is let through whatever its size.
        held: their current number.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self.held = 0

    def take(self, count: int) -> Callable[[], None]:
        """Count bytes as pending; return a function that takes them back.

        Raises:
            Refusal: 429, the key has too many.
        """
        if self.held and self.held + count > self.most:
            raise Refusal(
                429,
                "answers_unread",
                f"{self.held} bytes of this key's requests and answers are pending, {self.most} are allowed.",
                "Read the requested answers, then try again.",
                retry_after=1,
            )
        self.held += count
        return lambda: self.give(count)

    def give(self, count: int) -> None:
        """Count bytes as no longer pending."""
        self.held -= count
