"""API keys: made here, shown once, kept as a hash."""

from __future__ import annotations

import hashlib
import hmac
import secrets
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pema.serving.policy import Key

PREFIX = "pema_"
"""Lets secret scanners find a key that was committed by mistake."""


def new_key() -> str:
    """A fresh API key with 256 random bits."""
    return PREFIX + secrets.token_urlsafe(32)


def digest(key: str) -> str:
    """SHA-256 of a key, in hexadecimal: what the policy file stores.

    A slow hash makes guessing a password dear. A key is no password: with 256 random bits there is nothing to guess,
    so one SHA-256 hides it as well as any slow hash would, and costs a request nothing.
    """
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()


def identify(presented: str, keys: Sequence[Key]) -> Key | None:
    """Whose key it is; None where it is nobody's.

    Every key is compared, in constant time, whichever fits: how long it takes says nothing about the keys.
    """
    found: Key | None = None
    hashed = digest(presented).encode()
    for key in keys:
        if hmac.compare_digest(hashed, key.sha256.encode()):
            found = key
    return found
