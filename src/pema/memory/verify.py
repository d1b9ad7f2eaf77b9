"""Verification of every byte of a memory."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pema import console
from pema.errors import ExternalMemoryError, PemaError
from pema.files import recover, sha256
from pema.memory.manifest import FILE, HEAD, RESTORE, Manifest, require_complete
from pema.memory.reader import Memory
from pema.memory.shard import DamagedShardError
from pema.tensors import is_finite


@dataclass(frozen=True)
class Report:
    """A report of a successful verification: files, their bytes, and the pairs and examples in them."""

    files: int
    bytes: int
    pairs: int
    examples: int


def verify(path: Path | str) -> Report:
    """Verify the manifest's digest, every file's size and SHA-256, the shards' tensors and the head's fingerprint.

    Raises:
        ExternalMemoryError: the memory is incomplete or damaged; the message names each damaged file.
    """
    path = Path(path)
    recover(path)
    recover(path / HEAD)
    manifest = Manifest.read(path)
    require_complete(manifest, path)
    entries = (*manifest.head, *manifest.shards)
    faults: list[str] = []
    with console.progress("verifying", sum(entry.bytes for entry in entries), "bytes") as advance:
        for entry in entries:
            file = path / entry.file
            if not file.is_file():
                faults.append(f"{entry.file} is missing")
            elif file.stat().st_size != entry.bytes:
                faults.append(f"{entry.file} has {file.stat().st_size:,} bytes, expected {entry.bytes:,}")
            elif sha256(file) != entry.sha256:
                faults.append(f"{entry.file} has changed since it was written (its SHA-256 differs)")
            advance(entry.bytes)
    if not faults:
        faults = _implausible(Memory(path, manifest))
    if faults:
        raise ExternalMemoryError(f"{path} is damaged: {'; '.join(faults)}. To fix it, {RESTORE}")
    size = (path / FILE).stat().st_size
    return Report(len(entries) + 1, sum(entry.bytes for entry in entries) + size, manifest.pairs, manifest.examples)


def _implausible(memory: Memory) -> list[str]:
    """Find implausible values (NaN, inf, wrong layout) in files whose checksums match."""
    faults = []
    for shard in memory.shards:
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
