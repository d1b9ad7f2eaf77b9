"""Structured logs: one JSON object per line, and nothing that a client sent."""

from __future__ import annotations

import json
import logging
import sys
import traceback
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path


class JSONLines(logging.Formatter):
    """Formatter of a record as one JSON object, with the fields of `extra={"fields": {...}}`.

    Of an exception it contains the type and the place: its message and values may contain what a client sent.

    Args:
        always: fields of every line.
    """

    def __init__(self, always: Mapping[str, object] | None = None) -> None:
        super().__init__()
        self._always = dict(always or {})

    def format(self, record: logging.LogRecord) -> str:
        """Format one line."""
        line: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        line |= self._always | getattr(record, "fields", {})
        if record.exc_info and record.exc_info[1] is not None:
            error = record.exc_info[1]
            frames = traceback.extract_tb(error.__traceback__)[-3:]
            line["error"] = type(error).__name__
            line["at"] = [f"{Path(frame.filename).name}:{frame.lineno}" for frame in frames]
        return json.dumps(line, ensure_ascii=False)


class RateFilter(logging.Filter):
    """Filter of repeated messages of libraries, so that no client can fill a disk. Requests are all logged."""

    def __init__(self, seconds: float = 10.0, most: int = 1000) -> None:
        super().__init__()
        self._seconds, self._most = seconds, most
        self._said: dict[tuple[str, object], float] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether to write a record; records are told apart by their place in the code, because texts may vary."""
        if record.name.startswith("pema"):
            return True
        place = record.pathname, record.lineno
        if record.created - self._said.get(place, 0.0) < self._seconds:
            return False
        if len(self._said) >= self._most:
            self._said.clear()
        self._said[place] = record.created
        return True


def log_to_stderr(always: Mapping[str, object] | None = None) -> None:
    """Write all records of the process to stderr as JSON lines, with the fields `always`, and nothing else."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JSONLines(always))
    handler.addFilter(RateFilter())
    logging.captureWarnings(True)
    # The root logger takes the records of all libraries, asyncio and Python's warnings included.
    levels = (
        ("pema", logging.INFO),
        ("uvicorn", logging.WARNING),
        ("transformers", logging.WARNING),
        ("", logging.WARNING),
    )
    for name, level in levels:
        logger = logging.getLogger(name)
        logger.handlers = [handler]
        logger.setLevel(level)
        logger.propagate = False
