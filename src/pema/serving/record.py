"""The record of a request: names and numbers for the log and the metrics, nothing that the client sent."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

RECORD = "pema.record"
"""Name of the record in the scope of a request."""


@dataclass
class Record:
    """Facts recorded about a request.

    Attributes:
        request: its number, which is in the answer too.
        endpoint: its endpoint; never the path, which may contain a session's name.
        key: name of the API key; None if it is unknown.
        code: code of the error, if there was one.
        sequences: number of rows.
        tokens: requested tokens.
        representations: number of representations in the answer.
        ends: called when its answer is read, or given up.
    """

    request: str
    endpoint: str = "other"
    key: str | None = None
    code: str | None = None
    sequences: int = 0
    tokens: int = 0
    representations: int = 0
    ends: list[Callable[[], None]] = field(default_factory=list, repr=False)
