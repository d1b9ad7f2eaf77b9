"""A memory in object storage: its manifest is the index of its files."""

from __future__ import annotations

import re
from pathlib import Path

from pema.errors import ConfigError, ExternalMemoryError
from pema.files import JSON_BYTES
from pema.memory.manifest import FILE, HEAD, Manifest, parse_manifest, require_complete
from pema.owner.bundle import SETTINGS_FILE, TENSORS_FILE
from pema.processes import Processes
from pema.storage.address import is_address, shown
from pema.storage.artifact import Artifact, Part
from pema.storage.remote import Remote


def require_folder(output: Path | str, processes: Processes) -> None:
    """Refuse an address in object storage as the place that several processes write to.

    Raises:
        ConfigError: it is one.
    """
    if processes.count > 1 and is_address(output):
        raise ConfigError(
            f"{shown(str(output))} with {processes.count} processes: they write into one folder, and what goes to an "
            "address is written on the local disk first. Build into a folder that all processes share."
        )


def read_manifest(place: Path | str) -> Manifest:
    """Read the manifest of a complete memory; of one in object storage nothing else is read.

    Raises:
        ExternalMemoryError: there is none, it is incomplete or damaged; a local file is missing or truncated.
        StorageError: the storage cannot be read.
    """
    if not is_address(place):
        return Manifest.open(Path(place))
    remote = Remote(str(place))
    return _complete(remote.index(MEMORY), remote.shown)


def _complete(data: bytes, place: str) -> Manifest:
    manifest = parse_manifest(data, f"{place}/{FILE}")
    require_complete(manifest, place)
    return manifest


def _parts(data: bytes, place: str) -> list[Part]:
    manifest = _complete(data, place)
    return [Part(entry.file, entry.sha256, entry.bytes) for entry in (*manifest.head, *manifest.shards)]


def _follows(old: bytes, new: bytes) -> bool:
    """Return whether the second memory is the first one with examples appended."""
    try:
        first, second = (_complete(data, "") for data in (old, new))
    except ExternalMemoryError:
        return False
    lists = ((first.inputs, second.inputs), (first.shards, second.shards))
    return first.head == second.head and all(before == after[: len(before)] for before, after in lists)


MEMORY = Artifact(
    name="memory",
    index=FILE,
    limit=JSON_BYTES,
    files=re.compile(rf"{HEAD}/({re.escape(SETTINGS_FILE)}|{re.escape(TENSORS_FILE)})|shard-\d{{5,}}\.safetensors"),
    parts=_parts,
    follows=_follows,
    error=ExternalMemoryError,
)
