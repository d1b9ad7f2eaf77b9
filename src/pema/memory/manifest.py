# ruff: noqa: RUF009  (`option` is `dataclasses.field` with the limits beside the field)
"""The manifest: a JSON file with a memory's content, its PLM, and the checksum of every other file."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Self

from pema.errors import ConfigError, DataError, ExternalMemoryError, MismatchError
from pema.files import JSON_BYTES, clear, clear_below, parse_json, read_bytes, recover, seal, sha256, write_json
from pema.memory.config import Dtype, Targets
from pema.owner.bundle import SETTINGS_FILE, TENSORS_FILE
from pema.owner.contract import Contexts, PLMDescription
from pema.schema import check, from_json, option, short
from pema.tasks.example import Example
from pema.tasks.target_statistics import TargetStatistics
from pema.tasks.template import describe_prompts
from pema.tensors import HEADER_BYTES

FORMAT = "pema-memory"
VERSION = 1
PROMPTS_VERSION = 1
FILE = "manifest.json"
HEAD = "head"

ITEM_BYTES: dict[Dtype, int] = {"float32": 4, "float16": 2, "bfloat16": 2, "int8": 1}
"""Bytes per stored component of a representation."""


@dataclass(frozen=True)
class FileEntry:
    """A file of the memory: its path inside the folder, its size in bytes and its SHA-256 in hexadecimal."""

    file: str = option(line=True, longest=255)
    bytes: int = option(least=1, most=1 << 50)
    sha256: str = option(pattern="[0-9a-f]{64}")

    @classmethod
    def of(cls, folder: Path, file: str) -> Self:
        """Describe the file `folder / file`."""
        return cls(file, (folder / file).stat().st_size, sha256(folder / file))


@dataclass(frozen=True)
class PromptsEntry:
    """The prompts stored in a shard: version of their form, and the number of their tokens.

    `predicted` contexts are stored with the text that the PLM generated.
    """

    version: int = option(least=1, most=1 << 20)
    tokens: int = option(least=1, most=1 << 40)


@dataclass(frozen=True)
class ShardEntry(FileEntry):
    """A shard: a file, and the number of pairs and examples in it.

    Attributes:
        agreeing: number of pairs whose context the PLM itself continued with the gold token after the nearest gold
            prefix; None for `teacher` contexts, and if it was not counted.
        sources: whether the shard says which examples have the same source.
        prompts: the tokens of its prompts; None in memories of earlier versions.
        on_policy: whether an adapter wrote the text of its contexts, in a memory of `teacher` contexts.
    """

    pairs: int = option(least=1, most=1 << 40)
    examples: int = option(least=1, most=1 << 40)
    agreeing: int | None = option(None, least=0, most=1 << 40)
    sources: bool = option(False)
    prompts: PromptsEntry | None = option(None)
    on_policy: bool = option(False)

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-ready values, without a number that was not counted, and true flags only."""
        return {name: value for name, value in asdict(self).items() if value is not None and value is not False}


@dataclass(frozen=True)
class Input:
    """The input of one call of `build_memory`.

    Attributes:
        sha256: digest of the sources, targets and histories of its examples, in order.
        examples: number of examples.
        examples_per_shard: maximum number of examples per shard.
        statistics: length and lines of the targets; None in memories of older versions. Not compared: it follows from
            the examples.
        policy: digest of the adapter that wrote the text of the contexts; None if none did.
    """

    sha256: str = option(pattern="[0-9a-f]{64}")
    examples: int = option(least=1, most=1 << 40)
    examples_per_shard: int = option(least=1, most=1 << 40)
    statistics: TargetStatistics | None = field(default=None, compare=False)
    policy: str | None = option(None, pattern="[0-9a-f]{64}")

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-ready values; unknown statistics are left out, and the policy where there is none."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    @classmethod
    def of(cls, examples: Sequence[Example], examples_per_shard: int, policy: str | None = None) -> Input:
        """Describe `examples`; the digest covers each text's length (8 bytes, little-endian) and UTF-8 bytes.

        A history comes before its example: the number of turns with the highest bit set, which no length has, then
        the role and the content of each turn.
        """
        digest = hashlib.sha256()
        for example in examples:
            if example.history:
                digest.update((len(example.history) | 1 << 63).to_bytes(8, "little"))
            turns = (text for turn in example.history for text in (turn.role, turn.content))
            for text in (*turns, example.source, example.target):
                encoded = text.encode("utf-8", "surrogatepass")
                digest.update(len(encoded).to_bytes(8, "little") + encoded)
        return cls(digest.hexdigest(), len(examples), examples_per_shard, policy=policy)


@dataclass(frozen=True)
class Manifest:
    """The content of a memory.

    Attributes:
        plm: the PLM that computed the representations; `plm.tap` and `plm.d_tap` are their tap and width.
        task: name of the task.
        template: text of the prompt template.
        chat_template: SHA-256 of the chat template that the prompts are written in; None for plain prompts.
        system: system prompt of the chat, if one was given.
        contexts: what follows the prompt in a context; in shards that are `on_policy`, the text of an adapter.
        targets: which gold token is paired with a context.
        dtype: storage type of representations.
        inputs: the inputs of the memory; the second and later ones were appended.
        head: the files of the head bundle.
        shards: the shards, in order; every pair of shard k comes before those of shard k + 1.
        complete: whether every example of `inputs` is in the shards.
    """

    plm: PLMDescription = option()
    task: str = option(line=True, longest=200)
    template: str = option()
    contexts: Contexts = option()
    targets: Targets = option()
    dtype: Dtype = option()
    inputs: tuple[Input, ...] = option()
    head: tuple[FileEntry, ...] = option(())
    shards: tuple[ShardEntry, ...] = option(())
    complete: bool = option(False)
    chat_template: str | None = option(None, pattern="[0-9a-f]{64}")
    system: str | None = option(None)

    def __post_init__(self) -> None:
        check(self)
        if self.targets != "position" and self.contexts == "teacher":
            raise ConfigError(
                f"targets={self.targets!r} needs contexts='predicted': a teacher context agrees with its target."
            )
        if self.system is not None and self.chat_template is None:
            raise ConfigError(f"system={short(self.system)} needs a chat_template.")

    @property
    def pairs(self) -> int:
        """Number of pairs in the shards."""
        return sum(shard.pairs for shard in self.shards)

    @property
    def asked(self) -> Manifest:
        """This manifest with what is asked for the last input: an adapter's text is generated, also beside targets."""
        if self.contexts == "predicted" or self.inputs[-1].policy is None:
            return self
        return replace(self, contexts="predicted", targets="aligned")

    def generated(self, shard: ShardEntry) -> bool:
        """Return whether the text of a shard's contexts was generated, by the PLM or an adapter."""
        return self.contexts == "predicted" or shard.on_policy

    @property
    def agreement(self) -> float | None:
        """Share of the pairs whose token in the generated text agrees with the target; None if it was not counted."""
        counts = [shard.agreeing for shard in self.shards if shard.agreeing is not None]
        return sum(counts) / self.pairs if counts and len(counts) == len(self.shards) else None

    @property
    def examples(self) -> int:
        """Number of examples in the shards."""
        return sum(shard.examples for shard in self.shards)

    @property
    def bytes(self) -> int:
        """Size of the shards on the disk, in bytes."""
        return sum(shard.bytes for shard in self.shards)

    @property
    def statistics(self) -> TargetStatistics | None:
        """Length and lines of all targets; None if a part is of an older version, which did not record them."""
        parts = [entry.statistics for entry in self.inputs]
        known = [part for part in parts if part is not None]
        return TargetStatistics.merged(known) if known and len(known) == len(parts) else None

    def with_statistics(self, statistics: TargetStatistics) -> Manifest:
        """Return the manifest with the statistics of its last input."""
        return replace(self, inputs=(*self.inputs[:-1], replace(self.inputs[-1], statistics=statistics)))

    def add(self, shard: ShardEntry) -> Manifest:
        """Return the manifest with one more shard; it is complete once the shards contain all examples."""
        added = replace(self, shards=(*self.shards, shard))
        return replace(added, complete=added.examples == sum(entry.examples for entry in self.inputs))

    def require_same(self, other: Manifest, what: str) -> None:
        """Refuse `other` unless its pairs can be combined with those of this memory.

        Args:
            other: the manifest of `what`.
            what: the memory that `other` describes, for the message.

        Raises:
            MismatchError: the two differ; the message names the first difference.
        """
        self.plm.require_same(other.plm, what)
        for name in ("task", "template", "contexts", "targets", "dtype"):
            current, stored = getattr(self, name), getattr(other, name)
            if current != stored:
                raise MismatchError(
                    f"{what} was built with {name} {stored!r}, here it is {current!r}. "
                    f"Use the same {name}, or build into another folder."
                )
        prompts = [(each.chat_template, each.system) for each in (self, other)]
        if prompts[0] != prompts[1]:
            current, stored = (describe_prompts(*each) for each in prompts)
            raise MismatchError(
                f"{what} was built with {stored}, here they are {current}. Use the same (--chat, --no-chat, --system; "
                "in Python chat and system of the template), or build into another folder."
            )

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-ready values, with the counts and, as the last entry, the digest of all other entries."""
        values: dict[str, Any] = {
            "format": FORMAT,
            "version": VERSION,
            "complete": self.complete,
            "pairs": self.pairs,
            "examples": self.examples,
            "plm": self.plm.to_dict(),
            "task": self.task,
            "template": self.template,
            # Left out for plain prompts: memories of earlier versions have neither.
            **({} if self.chat_template is None else {"chat_template": self.chat_template, "system": self.system}),
            "contexts": self.contexts,
            "targets": self.targets,
            "dtype": self.dtype,
            "inputs": [entry.to_dict() for entry in self.inputs],
            "head": [asdict(entry) for entry in self.head],
            "shards": [entry.to_dict() for entry in self.shards],
        }
        return seal(values)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Manifest:
        """Parse the result of `to_dict`; the values are untrusted input.

        Raises:
            ConfigError: a field is missing or unknown, or its value is impossible.
        """
        derived = ("format", "version", "pairs", "examples", "digest")
        manifest = from_json(cls, {name: value for name, value in values.items() if name not in derived})
        manifest.require_possible()
        return manifest

    def require_possible(self) -> None:
        """Refuse an impossible manifest: unexpected file names, or sizes that do not match the content.

        Raises:
            ConfigError: an entry is impossible; the message names it.
        """
        files = [entry.file for entry in self.head]
        if files != ([f"{HEAD}/{name}" for name in (SETTINGS_FILE, TENSORS_FILE)] if files or self.complete else []):
            raise ConfigError(f"head lists {', '.join(map(short, files)) or 'no files'}, which is not a head bundle.")
        row, example, shard = self.bytes_of()
        for k, entry in enumerate(self.shards):
            if entry.file != file_name(k):
                raise ConfigError(f"shards[{k}].file={short(entry.file)} must be {file_name(k)!r}.")
            if entry.on_policy and not any(given.policy for given in self.inputs):
                raise ConfigError(f"shards[{k}].on_policy is impossible: no input has the text of an adapter.")
            if entry.agreeing is not None and (entry.agreeing > entry.pairs or not self.generated(entry)):
                raise ConfigError(
                    f"shards[{k}].agreeing={entry.agreeing:,} is impossible with {entry.pairs:,} pairs of "
                    f"{self.contexts} contexts."
                )
            prompts = self.prompt_bytes(entry)
            each = example + (8 if entry.sources else 0)
            header = entry.bytes - row * entry.pairs - each * entry.examples - shard - prompts - 8
            if entry.prompts is not None and entry.prompts.tokens < entry.examples:
                raise ConfigError(
                    f"shards[{k}] cannot have {entry.prompts.tokens:,} tokens in {entry.examples:,} prompts."
                )
            if entry.examples > entry.pairs or not 0 < header <= HEADER_BYTES:
                raise ConfigError(
                    f"shards[{k}] cannot have {entry.bytes:,} bytes with {entry.pairs:,} pairs of "
                    f"{entry.examples:,} examples."
                )

    def bytes_of(self) -> tuple[int, int, int]:
        """Return the bytes of a shard's tensors: per pair, per example (without `sources`), and the constant part."""
        int8 = self.dtype == "int8"
        return self.plm.d_tap * ITEM_BYTES[self.dtype] + (8 if int8 else 4), 12, 8 + (4 * self.plm.d_tap if int8 else 0)

    def prompt_bytes(self, entry: ShardEntry) -> int:
        """Return the bytes of a shard's tensors with tokens of prompts, and of the text after them."""
        if entry.prompts is None:
            return 0
        written = 4 * entry.pairs if self.generated(entry) else 0
        return 9 * entry.prompts.tokens + 8 * (entry.examples + 1) + written

    def write(self, folder: Path) -> None:
        """Write the manifest into `folder`, atomically."""
        write_json(folder / FILE, self.to_dict(), private=True)

    @classmethod
    def open(cls, folder: Path) -> Manifest:
        """Read the manifest of a complete memory, and check that its files exist and have their sizes.

        Raises:
            ExternalMemoryError: there is none, it is incomplete or damaged; a file is missing or truncated.
        """
        recover(folder)
        recover(folder / HEAD)
        manifest = cls.read(folder)
        require_complete(manifest, folder)
        for entry in (*manifest.head, *manifest.shards):
            file = folder / entry.file
            if not file.is_file():
                raise ExternalMemoryError(f"{file} is missing: {RESTORE}")
            if file.stat().st_size != entry.bytes:
                raise ExternalMemoryError(
                    f"{file} is damaged ({file.stat().st_size:,} bytes, expected {entry.bytes:,}): {RESTORE}"
                )
        return manifest

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Read the manifest of the memory at `folder`, complete or not.

        Raises:
            ExternalMemoryError: there is none, it has another format or version, or it is damaged.
        """
        path = folder / FILE
        if not path.exists():
            raise ExternalMemoryError(
                f"{folder} is not a memory (it has no {FILE}): check the path, or build one with `pema build`."
            )
        try:
            data = read_bytes(path, JSON_BYTES)
        except DataError as error:
            raise ExternalMemoryError(f"{path} is damaged (not the manifest of a memory: {error}) {RESTORE}") from None
        return parse_manifest(data, str(path))


def parse_manifest(data: bytes, path: str) -> Manifest:
    """Parse the content of a manifest, which is untrusted input; `path` is its place, for messages.

    Raises:
        ExternalMemoryError: it has another format or version, or it is damaged.
    """
    try:
        values = parse_json(data, "it")
    except DataError as error:
        raise ExternalMemoryError(f"{path} is damaged (not the manifest of a memory: {error}) {RESTORE}") from None
    if values.get("format") != FORMAT:
        raise ExternalMemoryError(
            f"{path} has format {short(values.get('format'))}, expected {FORMAT!r}: check the path."
        )
    if values.get("version") != VERSION:
        raise ExternalMemoryError(
            f"{path} has format version {short(values.get('version'))}, this pema reads version {VERSION}: use the "
            "pema version that wrote it."
        )
    newer = _newer_prompts(values.get("shards"))
    if newer is not None:
        raise ExternalMemoryError(
            f"{path} lists prompts of version {newer}, this pema reads version {PROMPTS_VERSION}: use the pema "
            "version that wrote it."
        )
    try:
        manifest = Manifest.from_dict(values)
    except ConfigError as error:
        raise ExternalMemoryError(f"{path} is damaged: {error} To fix it, {RESTORE}") from None
    if (json.dumps(manifest.to_dict(), indent=2, ensure_ascii=False) + "\n").encode() != data:
        raise ExternalMemoryError(f"{path} is damaged (its digest does not match): {RESTORE}")
    return manifest


def _newer_prompts(shards: object) -> int | None:
    """Return a version of prompts that is not read, of the listed shards, which are untrusted input."""
    for shard in shards if isinstance(shards, list) else []:
        prompts = shard.get("prompts") if isinstance(shard, dict) else None
        version = prompts.get("version") if isinstance(prompts, dict) else None
        if type(version) is int and version > PROMPTS_VERSION:
            return version
    return None


def file_name(index: int) -> str:
    """Return the file name of shard number `index`, counted from 0."""
    return f"shard-{index:05d}.safetensors"


RESTORE = "restore it from a copy, or build the memory again."


def require_path(output: Path, *, append: bool = False) -> None:
    """Refuse a path at which no memory can be built, resumed or appended to.

    Raises:
        ConfigError: `output` is a file, contains something else, or is not a memory although `append` is set.
    """
    if output.exists() and not output.is_dir():
        raise ConfigError(f"{output} is a file: choose a folder for the memory.")
    clear_below(output)
    if (output / FILE).exists():
        return
    if append:
        raise ConfigError(f"{output} is not a memory, so nothing can be appended to it: build it without append.")
    if output.is_dir() and any(output.iterdir()):
        raise ConfigError(f"{output} contains files but no memory: choose another folder.")


def refuse_existing(output: Path) -> None:
    """Refuse to overwrite an existing path.

    Raises:
        ConfigError: `output` exists.
    """
    clear(output)
    if output.exists():
        raise ConfigError(f"{output} exists already: choose another folder for the new memory.")


def require_complete(manifest: Manifest, folder: Path | str) -> None:
    """Refuse the memory at `folder` unless its build is complete.

    Raises:
        ExternalMemoryError: it is incomplete.
    """
    wanted = sum(entry.examples for entry in manifest.inputs)
    if not manifest.complete or manifest.examples != wanted:
        raise ExternalMemoryError(
            f"{folder} is incomplete ({manifest.examples:,} of {wanted:,} examples): run the same build again, "
            f"it resumes where it stopped."
        )
