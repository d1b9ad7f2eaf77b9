"""The packages of each extra, as the installed distribution declares them in its metadata.

A message names these packages and never the extra itself: on the package index the name `pema` belongs to another
project, with which `pip install -U 'pema[peft]'` would replace this one.
"""

from __future__ import annotations

import re
from importlib import metadata
from importlib.util import find_spec

from pema.errors import ConfigError

OF_EXTRA = re.compile(r"(?P<requirement>[^;]+?)\s*;.*\bextra\s*==\s*[\"'](?P<extra>[\w-]+)[\"']")


def installs(extra: str) -> str:
    """Return the command that installs the packages of an extra."""
    try:
        declared = [match for line in metadata.requires("pema") or () if (match := OF_EXTRA.match(line))]
    except metadata.PackageNotFoundError:  # the sources are on the path, without an installation
        declared = []
    packages = [f"'{match['requirement']}'" for match in declared if match["extra"] == extra]
    if not packages:
        return f"install the packages of the extra {extra!r}, which pyproject.toml lists"
    return f"pip install {' '.join(packages)}"


def require_library(what: str, library: str, extra: str) -> None:
    """Refuse `what` if a library of an extra is not installed; nothing is imported.

    Raises:
        ConfigError: it is not installed.
    """
    if find_spec(library) is None:
        raise ConfigError(f"{what} needs the library {library}, which is not installed: {installs(extra)}.")
