"""The file of spent quotas, which carries them over a restart of the server."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pema.errors import ConfigError, PemaError
from pema.files import read_json, write_json
from pema.serving.quota import Quota

logger = logging.getLogger(__name__)

FORMAT, VERSION = "pema-quotas", 1
SECONDS = 10.0
"""Seconds between two writes of the file: a killed server forgets what was spent since the last one."""


def restore(path: Path, quotas: Mapping[str, Quota], clock: Callable[[], float] = time.time) -> None:
    """Count what earlier servers wrote; a file that does not exist is an empty one.

    Raises:
        ConfigError: the file is not one of spent quotas.
    """
    if not path.exists():
        return
    try:
        values = read_json(path)
        if (values["format"], values["version"]) != (FORMAT, VERSION):
            raise ValueError("it has another format or version")
        passed = max(0.0, clock() - float(values["time"]))
        keys = {
            name: {window: _pairs(pairs) for window, pairs in spent.items()} for name, spent in values["keys"].items()
        }
    except (PemaError, ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise ConfigError(
            f"the quota file {path} is damaged ({error}): remove it to start with full quotas, or name another one in "
            "the policy (quota_file)."
        ) from error
    for name, quota in quotas.items():
        quota.restore(keys.get(name, {}), passed)


def write(path: Path, spent: Mapping[str, Any], clock: Callable[[], float] = time.time) -> None:
    """Write the result of `Quota.save` of each key atomically; log an error of the disk."""
    try:
        write_json(path, {"format": FORMAT, "version": VERSION, "time": clock(), "keys": spent}, private=True)
    except PemaError as error:
        logger.error("spent quotas could not be written", extra={"fields": {"why": str(error)}})


def _pairs(pairs: list[list[float]]) -> list[list[float]]:
    values = [[float(remaining), float(tokens)] for remaining, tokens in pairs]
    if not all(math.isfinite(value) and value >= 0 for pair in values for value in pair):
        raise ValueError("an impossible number")
    return values
