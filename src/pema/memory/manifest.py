"""The manifest: one JSON file that says what a memory holds, for which PLM, and the checksum of every other file."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, Self, get_args

from pema.errors import ConfigError, ExternalMemoryError, MismatchError
from pema.files import sha256, write_json
from pema.owner.contract import Contexts, PLMDescription
from pema.tasks.example import Example

FORMAT = "pema-memory"
VERSION = 1
FILE = "manifest.json"
HEAD = "head"

Targets = Literal["position", "aligned"]
"""Which gold token is paired with a `predicted` context: the one at its position, or the one that follows the gold
prefix nearest to what the PLM has generated."""

Dtype = Literal["float32", "float16", "bfloat16", "int8"]
"""How representations are stored."""


@dataclass(frozen=True)
class FileEntry:
    """One file of the memory: its path inside the folder, its size in bytes and its SHA-256 in hexadecimal."""

    file: str
    bytes: int
    sha256: str

    @classmethod
    def of(cls, folder: Path, file: str) -> Self:
        """Describe the file that lies at `folder / file`."""
        return cls(file, (folder / file).stat().st_size, sha256(folder / file))


@dataclass(frozen=True)
class ShardEntry(FileEntry):
    """One shard: a file, and how many pairs and examples it holds."""

    pairs: int
    examples: int


@dataclass(frozen=True)
class Input:
    """What one run of `build_memory` was given.

    Attributes:
        sha256: digest over the sources and targets of its examples, in order.
        examples: how many there were.
        examples_per_shard: the most examples that it puts into one shard.
    """

    sha256: str
    examples: int
    examples_per_shard: int

    @classmethod
    def of(cls, examples: Sequence[Example], examples_per_shard: int) -> Input:
        """Digest `examples`: each source and target as its length (8 bytes, little-endian) and its UTF-8 bytes."""
        digest = hashlib.sha256()
        for example in examples:
            for text in (example.source, example.target):
                encoded = text.encode("utf-8", "surrogatepass")
                digest.update(len(encoded).to_bytes(8, "little") + encoded)
        return cls(digest.hexdigest(), len(examples), examples_per_shard)


@dataclass(frozen=True)
class Manifest:
    """What a memory holds.

    Attributes:
        plm: the PLM that the representations come from; `plm.tap` and `plm.d_tap` say where and how wide they are.
        task: name of the task.
        template: text of the prompt template.
        contexts: what follows the prompt in a context.
        targets: which gold token is paired with a context.
        dtype: how representations are stored.
        inputs: what the memory was built from; the second and later ones were appended.
        head: the files of the head bundle.
        shards: the shards, in order; every pair of shard k comes before those of shard k + 1.
        complete: whether every example of `inputs` is in the shards.
    """

    plm: PLMDescription
    task: str
    template: str
    contexts: Contexts
    targets: Targets
    dtype: Dtype
    inputs: tuple[Input, ...]
    head: tuple[FileEntry, ...] = ()
    shards: tuple[ShardEntry, ...] = ()
    complete: bool = False

    def __post_init__(self) -> None:
        for name, choices in (("contexts", Contexts), ("targets", Targets), ("dtype", Dtype)):
            if getattr(self, name) not in get_args(choices):
                raise ConfigError(f"{name}={getattr(self, name)!r} is not one of {', '.join(get_args(choices))}.")
        if self.targets == "aligned" and self.contexts == "teacher":
            raise ConfigError(
                "targets='aligned' needs contexts='predicted': a teacher context already agrees with its target."
            )

    @property
    def pairs(self) -> int:
        """Pairs in the shards."""
        return sum(shard.pairs for shard in self.shards)

    @property
    def examples(self) -> int:
        """Examples in the shards."""
        return sum(shard.examples for shard in self.shards)

    @property
    def bytes(self) -> int:
        """Size of the shards on the disk."""
        return sum(shard.bytes for shard in self.shards)

    def add(self, shard: ShardEntry) -> Manifest:
        """The manifest with one more shard; complete once the shards hold every example of the inputs."""
        added = replace(self, shards=(*self.shards, shard))
        return replace(added, complete=added.examples == sum(entry.examples for entry in self.inputs))

    def require_same(self, other: Manifest, what: str) -> None:
        """Refuse `other` unless its pairs can stand beside those of this memory.

        Args:
            other: the manifest of `what`.
            what: the memory that `other` describes, for the message.

        Raises:
            MismatchError: names the first thing that differs.
        """
        self.plm.require_same(other.plm, what)
        for name in ("task", "template", "contexts", "targets", "dtype"):
            mine, theirs = getattr(self, name), getattr(other, name)
            if mine != theirs:
                raise MismatchError(
                    f"{what} was built with {name} {theirs!r}, here it is {mine!r}. "
                    f"Use the same {name}, or build into another folder."
                )

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values, with the counts and, last, the digest of all the others."""
        values: dict[str, Any] = {
            "format": FORMAT,
            "version": VERSION,
            "complete": self.complete,
            "pairs": self.pairs,
            "examples": self.examples,
            "plm": self.plm.to_dict(),
            "task": self.task,
            "template": self.template,
            "contexts": self.contexts,
            "targets": self.targets,
            "dtype": self.dtype,
            "inputs": [asdict(entry) for entry in self.inputs],
            "head": [asdict(entry) for entry in self.head],
            "shards": [asdict(entry) for entry in self.shards],
        }
        return values | {"digest": digest(values)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Manifest:
        """The inverse of `to_dict`."""
        fields = {name: values[name] for name in ("task", "template", "contexts", "targets", "dtype", "complete")}
        return cls(
            plm=PLMDescription.from_dict(values["plm"]),
            inputs=tuple(Input(**entry) for entry in values["inputs"]),
            head=tuple(FileEntry(**entry) for entry in values["head"]),
            shards=tuple(ShardEntry(**entry) for entry in values["shards"]),
            **fields,
        )

    def write(self, folder: Path) -> None:
        """Write the manifest into `folder`, whole or not at all."""
        write_json(folder / FILE, self.to_dict())

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Read the manifest of the memory at `folder`, complete or not.

        Raises:
            ExternalMemoryError: there is none, it is of another format or version, or a byte of it has changed.
        """
        path = folder / FILE
        try:
            data = path.read_bytes()
        except OSError:
            raise ExternalMemoryError(
                f"{folder} is not a memory (it has no {FILE}): check the path, or build one with `pema build`."
            ) from None
        try:
            values = json.loads(data)
            kind, version = values["format"], values["version"]
        except (ValueError, KeyError, TypeError):
            raise ExternalMemoryError(f"{path} is damaged (not the manifest of a memory): {RESTORE}") from None
        if kind != FORMAT:
            raise ExternalMemoryError(f"{path} is of format {kind!r}, not {FORMAT!r}: check the path.")
        if version != VERSION:
            raise ExternalMemoryError(
                f"{path} has format version {version}, this pema reads version {VERSION}: use the pema that wrote it."
            )
        try:
            manifest = cls.from_dict(values)
            whole = (json.dumps(manifest.to_dict(), indent=2, ensure_ascii=False) + "\n").encode() == data
        except (ValueError, KeyError, TypeError):
            whole = False
        if not whole:
            raise ExternalMemoryError(f"{path} is damaged (its digest does not match): {RESTORE}")
        return manifest


RESTORE = "restore it from a copy, or build the memory again."


def digest(values: dict[str, Any]) -> str:
    """SHA-256 over `values` as JSON with sorted keys and no spaces, in UTF-8."""
    return hashlib.sha256(
        json.dumps(values, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
    ).hexdigest()


def require_complete(manifest: Manifest, folder: Path) -> None:
    """Refuse the memory at `folder` unless its build ran to the end.

    Raises:
        ExternalMemoryError: it did not.
    """
    wanted = sum(entry.examples for entry in manifest.inputs)
    if not manifest.complete or manifest.examples != wanted:
        raise ExternalMemoryError(
            f"{folder} is incomplete ({manifest.examples:,} of {wanted:,} examples): run the same build again, "
            f"it goes on where it stopped."
        )
