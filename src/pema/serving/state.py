"""The state of a server's process, as far as the layers around its application know it."""

from __future__ import annotations


class State:
    """The state of a process that serves.

    Attributes:
        in_flight: requests that are being answered.
        draining: whether it is about to stop.
        failure: why it cannot serve, or None.
    """

    def __init__(self) -> None:
        self.in_flight = 0
        self.draining = False
        self.failure: BaseException | None = None

    @property
    def loading(self) -> bool:
        """Whether something is still being loaded."""
        return False

    @property
    def stuck(self) -> bool:
        """Whether a thread runs that cannot be stopped."""
        return False
