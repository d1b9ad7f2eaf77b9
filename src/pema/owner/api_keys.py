"""API keys as users set them: in an environment variable."""

from __future__ import annotations

import os

from pema.errors import ConfigError


def api_key(variable: str, given: str | None = None) -> str:
    """Return an API key without the white space around it, which comes with copying or with the lines of a file.

    Args:
        variable: the environment variable with the key.
        given: a key to use in place of the variable's.

    Returns:
        The key; "" if there is none.

    Raises:
        ConfigError: a character in it cannot be part of a header; the message does not contain the key.
    """
    key = (given or os.environ.get(variable, "")).strip()
    if not (key.isascii() and key.isprintable() and " " not in key):
        raise ConfigError(f"the API key contains invalid characters: check {variable}.")
    return key
