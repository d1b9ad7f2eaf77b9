"""What the server says when it does not do what it was asked: one shape for every error."""

from __future__ import annotations

import math
from typing import Any

from pema.errors import PemaError

LONGEST_WAIT = 86400.0
"""Seconds that a client may be asked to wait."""


class Refusal(PemaError):  # noqa: N818 - it is raised as what the caller is told
    """An answer other than the one that was asked for.

    Neither the message nor the remedy holds what the client sent, but for a number or an id that is at fault.

    Attributes:
        status: HTTP status, 4xx or 503.
        code: what a program tells refusals apart by.
        message: what is wrong.
        remedy: what to do next.
        retry_after: seconds after which the same request may succeed, or None.
    """

    def __init__(self, status: int, code: str, message: str, remedy: str, *, retry_after: float | None = None) -> None:
        super().__init__(f"{message} {remedy}")
        self.status = status
        self.code = code
        self.message = message
        self.remedy = remedy
        self.retry_after = retry_after

    @property
    def body(self) -> dict[str, Any]:
        """The JSON body."""
        return {"error": {"code": self.code, "message": self.message, "remedy": self.remedy}}

    @property
    def headers(self) -> dict[str, str]:
        """Headers that go with the status."""
        headers: dict[str, str] = {}
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        if self.retry_after is not None:
            # Settings may make it infinite, and no client waits for longer.
            headers["Retry-After"] = str(math.ceil(min(max(1.0, self.retry_after), LONGEST_WAIT)))
        return headers


POLICY_CHANGED = "the policy of this key changed"
"""A reason for which a session is closed."""


def session_expired(reason: str) -> Refusal:
    """410: the session was there, and why it is no more."""
    return Refusal(
        410,
        "session_expired",
        f"The session is closed: {reason}.",
        "Open a new one with the prompts and what was generated so far.",
    )
