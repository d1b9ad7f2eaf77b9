"""Reading from object storage: an artifact is copied to the local disk, and used there."""

from __future__ import annotations

from pathlib import Path

from pema import console
from pema.errors import StorageError
from pema.files import sha256
from pema.storage.address import is_address
from pema.storage.artifact import Artifact, Part
from pema.storage.cache import cached, snapshot
from pema.storage.remote import Remote


def local(place: str | Path, artifact: Artifact) -> Path:
    """Return the folder of an artifact: a local path as it is, that of an address after `fetch`."""
    return fetch(str(place), artifact) if is_address(place) else Path(place)


def fetch(address: str, artifact: Artifact) -> Path:
    """Copy an artifact to the local disk, unless it is there, and return its folder; it must not be changed.

    The index is read first, always from the storage. A file is in the folder once its SHA-256 is verified. A fetch that
    was interrupted continues where it stopped, and processes that fetch the same share the work.

    Args:
        address: the folder in object storage.
        artifact: what it contains.

    Raises:
        PemaError: it contains no such artifact (as `Artifact.error` says), or its index is damaged.
        StorageError: a file is missing, has another size or SHA-256 than the index says, or cannot be read or kept.
        ConfigError: an impossible address, or the library for its protocol is not installed.
    """
    remote = Remote(address)
    index = remote.index(artifact)
    parts = artifact.parts(index, remote.shown)
    with cached(remote.shown):
        return snapshot(index, artifact, parts, lambda part, to: _download(remote, part, to))


def _download(remote: Remote, part: Part, to: Path) -> None:
    """Write a file to `to`, after what an interrupted download left there, and verify its SHA-256."""
    size = remote.size(part.file)
    if size is None:
        raise StorageError(f"{remote.shown}/{part.file} is missing: upload it again from a copy.")
    if part.bytes not in (None, size):
        raise StorageError(
            f"{remote.shown}/{part.file} has {size:,} bytes, expected {part.bytes:,}: upload it again from a copy."
        )
    again = to.exists()
    while True:
        _append(remote, part.file, to, size)
        if sha256(to) == part.sha256:
            return
        to.unlink()
        if not again:
            raise StorageError(
                f"{remote.shown}/{part.file} is damaged (its SHA-256 is not the one in the index): upload it again "
                "from a copy."
            )
        again = False  # the part of an interrupted download may be what is damaged


def _append(remote: Remote, file: str, to: Path, size: int) -> None:
    with to.open("ab") as copy, console.progress(f"fetching {file}", size, "bytes") as advance:
        start = copy.tell()
        advance(start, earlier=True)
        for chunk in remote.chunks(file, start, size):
            copy.write(chunk)
            advance(len(chunk))
