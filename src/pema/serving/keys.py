"""API keys: created here, shown once, stored as a hash."""

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
    """Create an API key with 256 random bits."""
    return PREFIX + secrets.token_urlsafe(32)


def digest(key: str) -> str:
    """Return the SHA-256 of a key in hexadecimal, which the policy file contains.

    A slow hash makes guessing passwords expensive. A key with 256 random bits cannot be guessed, so SHA-256 hides it as
    well as any slow hash, at no cost per request.
    """
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()


def identify(presented: str, keys: Sequence[Key]) -> Key | None:
    """Return the rules of a key, or None if it is unknown.

    Every key is compared, in constant time, so that the duration reveals nothing about the keys.
    """
    match: Key | None = None
    hashed = digest(presented).encode()
    for key in keys:
        if hmac.compare_digest(hashed, key.sha256.encode()):
            match = key
    return match
