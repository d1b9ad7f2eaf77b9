"""The register of a build: shards are written in any order, and enter the manifest in their own.

A shard that is written before one in front of it gets a receipt: `receipt-00007.json` belongs to
`shard-00007.safetensors`, and is removed once the shard is in the manifest. It is a JSON object with a digest: the
digest of everything that the shard depends on, its group, and the entry that the manifest will have. So a killed build
keeps every shard, also with another number of processes.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path

from torch import Tensor

from pema import console
from pema.errors import ConfigError, DataError, ExternalMemoryError
from pema.files import discard, read_json, seal, unseal, write_json
from pema.memory.journal import identity_of
from pema.memory.manifest import Manifest, ShardEntry, file_name
from pema.memory.shard import ShardFile
from pema.schema import from_json

FORMAT = "pema-receipt"
VERSION = 1

LEAST_AGREEMENT = 0.15
"""Share of tokens on which the PLM's own text and the target agree; `predicted` contexts with less are warned of.

It lies between what was measured (docs/memory-format.md): 23 to 68 % for translation and rewriting, 5 to 7 % for texts
that the PLM alone does not write."""


class Register:
    """The shards of a build in progress; used by several threads.

    Attributes:
        folder: the memory.
        manifest: the manifest with the shards in front of the first one that is missing.
        waiting: the entries of shards after that one.
    """

    def __init__(
        self, folder: Path, manifest: Manifest, waiting: Mapping[int, ShardEntry], *, writes: bool = True
    ) -> None:
        """Begin with what is written.

        Args:
            folder: the memory.
            manifest: the manifest of the memory.
            waiting: entries of shards that are written but not in the manifest.
            writes: whether the manifest is written to the folder; if not, another process does.

        Raises:
            StorageError: writing the manifest failed.
        """
        self.folder, self.manifest, self.waiting = folder, manifest, dict(waiting)
        self._writes, self._of = writes, identity_of(manifest)
        self._lock = threading.RLock()
        self._enter_waiting()

    def __contains__(self, index: int) -> bool:
        return index < len(self.manifest.shards) or index in self.waiting

    def enter(self, index: int, group: range, entry: ShardEntry) -> None:
        """Enter a shard that is written: into the manifest, or with a receipt if one in front of it is missing.

        Raises:
            StorageError: writing failed; the manifest and the receipts are those before.
        """
        with self._lock:
            if not self._writes or index > len(self.manifest.shards):
                values = {"format": FORMAT, "version": VERSION, "of": self._of}
                values |= {"first": group.start, "count": len(group), "shard": entry.to_dict()}
                write_json(self.folder / receipt_name(index), seal(values), private=True)
            self.accept(index, entry)

    def accept(self, index: int, entry: ShardEntry) -> None:
        """Accept a shard that has been entered here or by another process.

        Raises:
            StorageError: writing the manifest failed.
        """
        with self._lock:
            if index not in self:
                self.waiting[index] = entry
                self._enter_waiting()

    def _enter_waiting(self) -> None:
        """Move what is complete from the entries that wait to the manifest."""
        before = len(self.manifest.shards)
        while (entered := self.waiting.pop(len(self.manifest.shards), None)) is not None:
            self.manifest = self.manifest.add(entered)
        if self._writes and len(self.manifest.shards) > before:
            self.manifest.write(self.folder)
            for k in range(before, len(self.manifest.shards)):
                discard(self.folder / receipt_name(k))
            if before == 0:
                _warn(self.manifest)

    @property
    def channel_scales(self) -> Tensor | None:
        """The channel scales of the memory's first shard; None if there is none yet, or they are not needed."""
        manifest = self.manifest
        if manifest.dtype != "int8" or not manifest.shards:
            return None
        return ShardFile(self.folder, manifest.shards[0], manifest).channel_scales


def read_receipts(folder: Path, manifest: Manifest, groups: Mapping[int, range]) -> dict[int, ShardEntry]:
    """Return the entries of the shards that have a receipt and are whole.

    What is damaged, and what belongs to another build, is ignored: it is written again.

    Args:
        folder: the memory.
        manifest: its manifest.
        groups: the groups whose shards are not in the manifest, by their number.
    """
    of = identity_of(manifest)
    entries = {}
    for index, path in _receipts(folder):
        if index not in groups:
            continue
        with contextlib.suppress(DataError, ConfigError, ExternalMemoryError):
            values = unseal(read_json(path))
            group = groups[index]
            expected = {"format": FORMAT, "version": VERSION, "of": of, "first": group.start, "count": len(group)}
            entry = from_json(ShardEntry, values.pop("shard", None), "shard")
            if values == expected and (entry.file, entry.examples) == (file_name(index), len(group)):
                ShardFile(folder, entry, manifest).require_whole()
                entries[index] = entry
    return entries


def clear_receipts(folder: Path, shards: int) -> None:
    """Remove the receipts of the first `shards` shards, which a killed build has left.

    Raises:
        StorageError: one cannot be removed.
    """
    for index, path in _receipts(folder):
        if index < shards:
            discard(path)


def receipt_name(index: int) -> str:
    """Return the file name of the receipt of shard number `index`."""
    return f"receipt-{index:05d}.json"


def _receipts(folder: Path) -> Iterator[tuple[int, Path]]:
    for path in sorted(folder.glob("receipt-*.json")):
        number = path.name.removeprefix("receipt-").removesuffix(".json")
        if number.isascii() and number.isdecimal() and path.name == receipt_name(int(number)):
            yield int(number), path


def _warn(manifest: Manifest) -> None:
    """Warn if the PLM's own texts have too little in common with the targets for `predicted` contexts."""
    share = manifest.agreement
    if manifest.inputs[0].policy is None and share is not None and share < LEAST_AGREEMENT:
        console.note(
            f"The PLM's own texts agree with the targets on {share:.0%} of their tokens, less than "
            f"{LEAST_AGREEMENT:.0%}: predicted contexts teach little here. If the PLM's owner may see the targets, "
            "build with teacher contexts."
        )
