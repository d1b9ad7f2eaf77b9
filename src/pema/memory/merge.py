"""Merging memories of one PLM."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from pema import console
from pema.errors import ConfigError, ExternalMemoryError
from pema.files import writing
from pema.memory.manifest import HEAD, RESTORE, ShardEntry, file_name, refuse_existing
from pema.memory.places import MEMORY
from pema.memory.reader import Memory
from pema.storage.fetching import local
from pema.storage.publishing import destination

CHUNK = 1 << 22


def merge(paths: Sequence[Path | str], output: Path | str) -> Memory:
    """Copy the shards of several memories, in order, into a new one.

    Every shard's checksum is verified while it is copied, so a damaged memory is refused.

    Args:
        paths: complete memories of one PLM, tokenizer, tap, task, template, context mode and dtype; also addresses.
        output: folder of the new memory, which must not exist; or its address.

    Raises:
        ConfigError: fewer than two memories, the same one twice, or `output` exists.
        MismatchError: they do not belong together; the message names the memory and the difference.
        ExternalMemoryError: one is damaged or incomplete.
        StorageError: a write failed; nothing is left at `output`.
    """
    if len(paths) < 2:
        raise ConfigError(f"merge needs at least two memories, got {len(paths)}.")
    folders = [local(path, MEMORY) for path in paths]
    twice = [folder for k, folder in enumerate(folders) if folder.resolve() in {f.resolve() for f in folders[:k]}]
    if twice:
        raise ConfigError(f"{twice[0]} is given twice: its pairs would count twice. Give each memory once.")
    with destination(output, MEMORY, anew=True) as new:
        _merge(folders, new)
    return Memory.open(output)


def _merge(folders: Sequence[Path], output: Path) -> None:
    refuse_existing(output)
    memories = [Memory.open(folder) for folder in folders]
    manifest = memories[0].manifest
    for memory in memories[1:]:
        manifest.require_same(memory.manifest, str(memory.path))
    merged = replace(
        manifest,
        inputs=tuple(entry for memory in memories for entry in memory.manifest.inputs),
        shards=(),
        complete=False,
    )
    total = sum(memory.bytes for memory in memories)
    with writing(output, private=True) as folder, console.progress("merging", total, "bytes") as advance:
        copy_head(memories[0], folder)
        for memory in memories:
            for entry in memory.manifest.shards:
                merged = merged.add(_copy(memory.path, entry, folder, len(merged.shards)))
                advance(entry.bytes)
        merged.write(folder)


def copy_head(memory: Memory, folder: Path) -> None:
    """Verify the head bundle of `memory` and copy it into `folder`."""
    memory.head()
    shutil.copytree(memory.path / HEAD, folder / HEAD)


def _copy(source: Path, entry: ShardEntry, folder: Path, index: int) -> ShardEntry:
    digest = hashlib.sha256()
    with (source / entry.file).open("rb") as old, (folder / file_name(index)).open("wb") as new:
        while chunk := old.read(CHUNK):
            digest.update(chunk)
            new.write(chunk)
    if digest.hexdigest() != entry.sha256:
        raise ExternalMemoryError(
            f"{source / entry.file} is damaged (changed since it was written: its SHA-256 differs): {RESTORE}"
        )
    return replace(entry, file=file_name(index))
