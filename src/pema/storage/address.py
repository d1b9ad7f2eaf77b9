"""Addresses of folders in object storage: `protocol://place`, as fsspec reads them."""

from __future__ import annotations

import re
from pathlib import Path

from pema.errors import ConfigError

ADDRESS = re.compile(r"(?P<protocol>[a-z][a-z0-9+.-]+)://(?:(?P<user>[^/]*)@)?(?P<rest>.*)", re.DOTALL)
"""An address; `user` are the credentials in it, if there are any."""

AS_PATH = re.compile(r"([a-z][a-z0-9+.-]+):/(?!/)")


def is_address(place: str | Path) -> bool:
    """Return whether a place is an address and not a local path.

    Raises:
        ConfigError: it is neither, and as a path it would be a folder of this machine: an address that became a `Path`,
            which drops one of its slashes, one with a single slash, or one that does not begin with a protocol.
    """
    if isinstance(place, str):
        if ADDRESS.match(place):
            return True
        protocol, colon, _ = place.partition("://")
        if colon:
            raise ConfigError(
                f"{protocol}://... is not an address: it begins with one of fsspec's protocols, in small letters and "
                "without a chain (::), such as s3://bucket/folder."
            )
    match = AS_PATH.match(str(place))
    if match and _is_protocol(match[1]):
        if isinstance(place, Path):
            raise ConfigError(f"{place} is an address in a Path, which drops a slash: give it as a str.")
        raise ConfigError(f"{match[1]}:/... has one slash: an address has two, such as {match[1]}://bucket/folder.")
    return False


def require_local(path: Path) -> None:
    """Refuse an address as the place of a file or folder that is always local.

    Raises:
        ConfigError: it is one.
    """
    match = AS_PATH.match(str(path))
    if match and _is_protocol(match[1]):
        raise ConfigError(
            f"{match[1]}://... is an address, where only memories, adapters and head bundles are written: give a local "
            "file or folder, and copy it."
        )


def shown(place: str | Path) -> str:
    """Return a place for messages and results: an address without the credentials in it."""
    match = ADDRESS.match(str(place))
    return str(Path(place)) if match is None else f"{match['protocol']}://{match['rest']}"


def credentials(address: str) -> str | None:
    """Return the credentials in an address."""
    match = ADDRESS.match(address)
    return match and match["user"]


def joined(place: str | Path, name: str) -> str | Path:
    """Return the place of `name` in a folder; "" is the folder itself."""
    if not is_address(place):
        return Path(place) / name
    return f"{str(place).rstrip('/')}/{name}".rstrip("/")


def name_of(place: str | Path) -> str:
    """Return the last part of a place."""
    return Path(shown(place).partition("://")[2] if is_address(place) else place).name


def _is_protocol(name: str) -> bool:
    from fsspec import available_protocols

    return name in available_protocols()
