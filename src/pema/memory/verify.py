"""Verification of every byte of a memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from pema import console
from pema.errors import ExternalMemoryError, PemaError
from pema.files import recover, sha256
from pema.memory.manifest import FILE, HEAD, RESTORE, Manifest, require_complete
from pema.memory.places import MEMORY, read_manifest
from pema.memory.reader import Memory
from pema.memory.shard import DamagedShardError
from pema.processes import ALONE, Processes
from pema.storage.address import is_address, shown
from pema.storage.fetching import local
from pema.storage.remote import Remote
from pema.tensors import is_finite


@dataclass(frozen=True)
class Report:
    """A report of a successful verification: files, their bytes, and the pairs and examples in them."""

    files: int
    bytes: int
    pairs: int
    examples: int


def verify(path: Path | str, processes: Processes = ALONE) -> Report:
    """Verify the manifest's digest, every file's size and SHA-256, the shards' tensors and the head's fingerprint.

    Of a memory in object storage every file is read there, whatever the local disk has of it.

    Args:
        path: the memory's folder.
        processes: several processes verify a part of the files each.

    Raises:
        ExternalMemoryError: the memory is incomplete or damaged; the message names each damaged file.
        StorageError: the storage cannot be read.
    """
    manifest, size, digest = _stored(str(path)) if is_address(path) else _here(Path(path))
    files = (*manifest.head, *manifest.shards)
    entries = files[processes.part(len(files))]
    faults: list[str] = []
    with console.progress("verifying", sum(entry.bytes for entry in entries), "bytes") as advance:
        for entry in entries:
            existing = size(entry.file)
            if existing is None:
                faults.append(f"{entry.file} is missing")
            elif existing != entry.bytes:
                faults.append(f"{entry.file} has {existing:,} bytes, expected {entry.bytes:,}")
            elif digest(entry.file, existing) != entry.sha256:
                faults.append(f"{entry.file} has changed since it was written (its SHA-256 differs)")
            advance(entry.bytes)
    if not faults:
        faults = _implausible(Memory(local(path, MEMORY), manifest), processes)
    if faults:
        raise ExternalMemoryError(f"{shown(path)} is damaged: {'; '.join(faults)}. To fix it, {RESTORE}")
    total = sum(entry.bytes for entry in files) + (size(FILE) or 0)
    return Report(len(files) + 1, total, manifest.pairs, manifest.examples)


Size = Callable[[str], int | None]
"""Returns the size of a file of the memory; None if it is missing."""

Digest = Callable[[str, int], str]
"""Returns the SHA-256 of a file of the memory, given its size."""


def _here(folder: Path) -> tuple[Manifest, Size, Digest]:
    recover(folder)
    recover(folder / HEAD)
    manifest = Manifest.read(folder)
    require_complete(manifest, folder)

    def size(file: str) -> int | None:
        return (folder / file).stat().st_size if (folder / file).is_file() else None

    return manifest, size, lambda file, _: sha256(folder / file)


def _stored(address: str) -> tuple[Manifest, Size, Digest]:
    remote = Remote(address)
    return read_manifest(address), remote.size, remote.sha256


def _implausible(memory: Memory, processes: Processes) -> list[str]:
    """Find implausible values (NaN, inf, wrong layout) in files whose checksums match."""
    faults = []
    for shard in memory.shards[processes.part(len(memory.shards))]:
        try:
            contents = shard.contents()
            values = contents.representations if contents.scales is None else contents.scales
            if not is_finite(values):
                raise shard.damaged("it contains NaN or infinity")
            if contents.scales is not None and bool((contents.scales < 0).any()):
                raise shard.damaged("one of its scales is negative")
        except DamagedShardError as error:
            faults.append(f"{shard.entry.file} has implausible content ({error.why})")
    try:
        memory.head()
    except PemaError as error:
        faults.append(str(error).rstrip("."))
    return faults
