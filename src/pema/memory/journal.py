"""The journal of a build: answers of the PLM whose shard is not written yet, so that a kill or an error keeps them.

`answers-00003.journal` belongs to `shard-00003.safetensors` and is removed once that shard is in the manifest. It is a
sequence of records. A record consists of the length of its content (8 bytes, little-endian), its SHA-256 (32
bytes) and its content. The first record is JSON: the format, and the group of the answers. Every further record
is a safetensors file with some answers: `indices` and `counts` (k,) int64, `representations` (sum of counts,
d_tap) as returned by the PLM, and `generated` (sum of counts,) int64 for `predicted` contexts.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from pema.errors import StorageError
from pema.files import PRIVATE_FILE, digest, discard, open_regular
from pema.memory.manifest import Manifest
from pema.owner.contract import ContextRepresentations

FORMAT = "pema-answers"
VERSION = 1
SUFFIX = ".journal"

SECONDS = 5.0
"""Maximum age of unwritten answers, which a kill loses. A group that is complete sooner is not written."""

_HASH = 32
_LENGTH = 8


class Journal:
    """The answers for one group of examples, in a file.

    Attributes:
        path: the file, which may not exist.
        answers: the answers in the file, by index.
    """

    def __init__(self, folder: Path, index: int, group: range, manifest: Manifest) -> None:
        """Open the journal of shard number `index`, whose examples are `group` of the manifest's last input."""
        self.path = folder / journal_name(index)
        self._count, self._d_tap = len(group), manifest.plm.d_tap
        self._predicted = manifest.contexts == "predicted"
        self._first = json.dumps(
            {
                "format": FORMAT,
                "version": VERSION,
                "of": identity_of(manifest),
                "first": group.start,
                "count": len(group),
            }
        ).encode()
        self.answers: dict[int, ContextRepresentations] = {}
        self._pending: list[ContextRepresentations] = []
        self._bytes = 0
        self._written = time.monotonic()
        self._read()

    def add(self, answer: ContextRepresentations) -> None:
        """Add an answer; it is written with the next `flush`, or with the first answer after `SECONDS`.

        An answer with an invalid shape is not stored: the build refuses it.

        Raises:
            StorageError: writing failed.
        """
        f, generated = answer.representations, answer.generated
        words = None if generated is None else generated.shape
        if f.ndim == 2 and f.shape[1] == self._d_tap and words == (f.shape[:1] if self._predicted else None):
            self._pending.append(answer)
        if time.monotonic() - self._written >= SECONDS:
            self.flush()

    def flush(self) -> None:
        """Write all answers that are not written yet.

        Raises:
            StorageError: writing failed; the previous records are complete.
        """
        if not self._pending:
            return
        data = _record(_content(self._pending))
        if self._bytes == 0:
            data = _record(self._first) + data
        try:
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, PRIVATE_FILE)
            with os.fdopen(descriptor, "r+b") as file:
                # An incomplete record of a killed writer.
                file.truncate(self._bytes)
                file.seek(self._bytes)
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise StorageError(f"cannot write {self.path}: {error.strerror or error}.") from error
        self._bytes += len(data)
        self._pending = []
        self._written = time.monotonic()

    def remove(self) -> None:
        """Remove the file, if it exists.

        Raises:
            StorageError: it cannot be removed.
        """
        discard(self.path)

    def _read(self) -> None:
        """Read the complete records; truncated or changed records and those of another group are ignored."""
        try:
            with open_regular(self.path) as descriptor, os.fdopen(os.dup(descriptor), "rb") as file:
                records = _records(file.read())
        except OSError:
            return
        if next(records, b"") != self._first:
            return
        self._bytes = _LENGTH + _HASH + len(self._first)
        for content in records:
            answers = self._parse(content)
            if answers is None:
                return
            self.answers |= {answer.index: answer for answer in answers}
            self._bytes += _LENGTH + _HASH + len(content)

    def _parse(self, content: bytes) -> list[ContextRepresentations] | None:
        """Return the answers of one record; None if it does not belong to this group."""
        try:
            tensors = safetensors.torch.load(content)
        except SafetensorError:
            return None
        names = {"indices", "counts", "representations"} | ({"generated"} if self._predicted else set())
        if set(tensors) != names:
            return None
        indices, counts, f = (tensors[name] for name in ("indices", "counts", "representations"))
        generated = tensors.get("generated")
        total = int(counts.sum()) if counts.dtype == torch.int64 and counts.ndim == 1 else -1
        fits = (
            indices.dtype == torch.int64
            and indices.shape == counts.shape
            and bool(((indices >= 0) & (indices < self._count)).all() and (counts >= 1).all())
            and f.shape == (total, self._d_tap)
            and f.is_floating_point()
            and (generated is None or (generated.dtype, generated.shape) == (torch.int64, (total,)))
        )
        if not fits:
            return None
        lengths = counts.tolist()
        words: list[Tensor | None] = [None] * len(lengths)
        if generated is not None:
            words = list(torch.split(generated, lengths))
        parts = zip(indices.tolist(), torch.split(f, lengths), words, strict=True)
        return [ContextRepresentations(index, rows, text) for index, rows, text in parts]


def clear_journals(folder: Path, shards: int) -> None:
    """Remove the journals of the first `shards` shards, which a killed build has left.

    Raises:
        StorageError: one cannot be removed.
    """
    for path in folder.glob(f"answers-*{SUFFIX}"):
        number = path.name.removeprefix("answers-").removesuffix(SUFFIX)
        if number.isascii() and number.isdecimal() and int(number) < shards:
            discard(path)


def journal_name(index: int) -> str:
    """Return the file name of the journal of shard number `index`."""
    return f"answers-{index:05d}{SUFFIX}"


def identity_of(manifest: Manifest) -> str:
    """Return the digest of everything that the answers depend on."""
    values = manifest.to_dict()
    grows = ("complete", "pairs", "examples", "head", "shards", "digest")
    return digest({name: value for name, value in values.items() if name not in grows})


def _content(answers: list[ContextRepresentations]) -> bytes:
    tensors = {
        "indices": torch.tensor([answer.index for answer in answers]),
        "counts": torch.tensor([len(answer.representations) for answer in answers]),
        "representations": torch.cat([answer.representations for answer in answers]).contiguous(),
    }
    generated = [answer.generated for answer in answers if answer.generated is not None]
    if generated:
        tensors["generated"] = torch.cat(generated).to(torch.int64)
    content: bytes = safetensors.torch.save(tensors)
    return content


def _record(content: bytes) -> bytes:
    return len(content).to_bytes(_LENGTH, "little") + hashlib.sha256(content).digest() + content


def _records(data: bytes) -> Iterator[bytes]:
    """Yield the contents of the complete records at the start of `data`."""
    start = 0
    while start + _LENGTH + _HASH <= len(data):
        length = int.from_bytes(data[start : start + _LENGTH], "little")
        start += _LENGTH + _HASH
        content = data[start : start + length]
        if len(content) < length or hashlib.sha256(content).digest() != data[start - _HASH : start]:
            return
        yield content
        start += length
