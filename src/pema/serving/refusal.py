"""Refusals of requests: one format for all errors."""

from __future__ import annotations

import math
from typing import Any

from pema.errors import PemaError

LONGEST_WAIT = 86400.0
"""Maximum seconds of a Retry-After."""


class Refusal(PemaError):  # noqa: N818 - it is the answer to the client
    """An error that is the answer to a request.

    Neither the message nor the remedy contains what the client sent, except for an offending number or id.

    Attributes:
        status: HTTP status, 4xx or 503.
        code: identifies the error for a program.
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
        """Body of the answer, for JSON."""
        return {"error": {"code": self.code, "message": self.message, "remedy": self.remedy}}

    @property
    def headers(self) -> dict[str, str]:
        """Headers of the answer that belong to the status."""
        headers: dict[str, str] = {}
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        if self.retry_after is not None:
            # Settings may make it infinite, and no client waits longer.
            headers["Retry-After"] = str(math.ceil(min(max(1.0, self.retry_after), LONGEST_WAIT)))
        return headers


POLICY_CHANGED = "the policy of this key changed"
"""A reason for which a session is closed."""


def disconnected() -> Refusal:
    """Return the refusal for a client that has left."""
    return Refusal(400, "disconnected", "The client left.", "Send the request again.")


def draining() -> Refusal:
    """Return the refusal of a server that is about to stop."""
    return Refusal(503, "draining", "The server is stopping.", "Try again after its restart.", retry_after=10)


def loading() -> Refusal:
    """Return the refusal of a server that is not ready yet."""
    return Refusal(503, "loading", "The PLM is being loaded.", "Try again in a moment.", retry_after=5)


def slow_body(seconds: float) -> Refusal:
    """Return the refusal of a body that did not arrive in time."""
    return Refusal(408, "slow_body", f"The body took over {seconds:g} seconds.", "Send it again.")


def session_expired(reason: str) -> Refusal:
    """Return the refusal for a session that was closed, with the reason."""
    return Refusal(
        410,
        "session_expired",
        f"The session is closed: {reason}.",
        "Open a new one with the prompts and the tokens generated so far.",
    )
