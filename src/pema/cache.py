"""The folder for files that pema can make again."""

from __future__ import annotations

import os
from pathlib import Path

VARIABLE = "PEMA_CACHE"
"""Environment variable that names the folder."""


def cache_folder() -> Path:
    """Return the folder: $PEMA_CACHE, else `pema` in $XDG_CACHE_HOME, else ~/.cache/pema."""
    own = os.environ.get(VARIABLE, "")
    if own:
        return Path(own).expanduser()
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    # The XDG specification requires that relative paths are ignored; an unset variable is one.
    return (base if base.is_absolute() else Path.home() / ".cache") / "pema"
