"""Building an external memory: step 1 of PEMA, on the data owner's side of the boundary.

A run is a sequence of groups of examples, and which examples make up a group depends on the input and the settings
alone. One group is one shard. The manifest is rewritten after each shard, and both are whole or absent, so a run that
is killed goes on behind its last whole shard and ends with the bytes of a run that was not.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from pema import console
from pema.errors import ConfigError, DataError, ExternalMemoryError, MismatchError, OwnerError
from pema.files import TEMPORARY, exclusive, recover
from pema.memory.manifest import FILE, HEAD, Dtype, FileEntry, Input, Manifest, Targets
from pema.memory.pairing import pair
from pema.memory.reader import Memory
from pema.memory.shard import DTYPES, Contents, Integers, store, write_shard
from pema.owner.contract import PLM, Contexts, PLMDescription, Represented, padded
from pema.tasks.example import Example

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from pema.tasks.registry import Task
    from pema.tasks.template import Template

EXAMPLES_PER_SHARD = 512
SHARD_BYTES = 1 << 27
"""A group ends before its representations would take more than this, so that wide PLMs do not fill the RAM."""

ENCODED_AT_ONCE = 4096


def build_memory(
    plm: PLM,
    examples: Iterable[Example],
    task: Task,
    output: Path,
    *,
    contexts: Contexts = "teacher",
    targets: Targets = "position",
    dtype: Dtype = "float16",
    limit: int | None = None,
    batch_tokens: int = 8192,
    examples_per_shard: int = EXAMPLES_PER_SHARD,
    append: bool = False,
) -> Memory:
    """Store (f(c_i), y_i) for every target token of every example.

    Started again with the same arguments, it goes on where it was interrupted; where nothing is left to do, it
    returns the memory as it is. All examples are encoded and checked before the PLM is asked for anything.

    Args:
        plm: the frozen language model.
        examples: the pairs of texts.
        task: its template makes the prompts.
        output: folder of the memory.
        contexts: what follows the prompt in a context: the target's own prefix ("teacher") or what the PLM generates.
        targets: with "predicted" contexts, how they are paired with gold tokens: see `pairing.pair`.
        dtype: how representations are stored: float32, float16, bfloat16, or int8 with a scale per row.
        limit: use the first `limit` examples only.
        batch_tokens: tokens in one batch of the PLM; may differ when a build is taken up again.
        examples_per_shard: the most examples in one shard.
        append: add the examples to a complete memory.

    Returns:
        The complete memory, opened.

    Raises:
        ConfigError: settings that cannot be meant; a folder that holds something else; a value too large for `dtype`.
        DataError: no examples; an example that cannot be used (named by `Example.where`).
        MismatchError: the folder's memory was begun with another PLM, setting or input.
        ExternalMemoryError: the folder's memory is damaged, or incomplete where it is to be appended to.
        OwnerError: the PLM did not hand out what it was asked for.
        StorageError: the disk refused a write, or another process builds in the folder; the shards written so far stay
            valid.
    """
    for name, value in (("limit", limit), ("batch_tokens", batch_tokens), ("examples_per_shard", examples_per_shard)):
        if value is not None and value < 1:
            raise ConfigError(f"{name}={value} must be at least 1.")
    output = Path(output)
    examples = list(examples)[:limit]
    if not examples:
        raise DataError("there are no examples to build a memory from: check the input files.")
    wanted = Manifest(
        plm=plm.description,
        task=task.name,
        template=task.template.text,
        contexts=contexts,
        targets=targets,
        dtype=dtype,
        inputs=(Input.of(examples, examples_per_shard),),
    )
    if output.exists() and not output.is_dir():
        raise ConfigError(f"{output} is a file: choose a folder for the memory.")
    with exclusive(output):
        manifest = _begin(wanted, output, append)
        if manifest.complete:
            console.note(f"{output} already holds these {len(examples):,} examples: nothing to do.")
            return Memory.open(output)
        tokens = Tokens.encode(plm, task.template, examples)
        manifest.write(output)
        manifest = _with_head(manifest, plm, output)
        _write_shards(manifest, plm, examples, tokens, output, batch_tokens)
    return Memory.open(output)


def _begin(wanted: Manifest, output: Path, append: bool) -> Manifest:
    """The manifest that this run starts from: a new one, that of an interrupted run, or a complete one to append to."""
    leftovers = {FILE + TEMPORARY}  # of a build that was killed while it wrote its first manifest
    if not (output / FILE).exists():
        if append:
            raise ConfigError(f"{output} is not a memory, so nothing can be appended to it: build it without append.")
        if {path.name for path in output.iterdir()} - leftovers:
            raise ConfigError(f"{output} holds files but no memory: choose another folder.")
        return wanted
    found = Manifest.read(output)
    wanted.require_same(found, str(output))
    if found.inputs[-1] == wanted.inputs[0]:
        return found
    if not append:
        mine, theirs = wanted.inputs[0], found.inputs[-1]
        how = (
            f"with examples_per_shard={theirs.examples_per_shard}, here it is {mine.examples_per_shard}"
            if replace(mine, examples_per_shard=theirs.examples_per_shard) == theirs
            else f"from another input ({theirs.examples:,} examples, digest {theirs.sha256[:12]}; "
            f"here {mine.examples:,}, digest {mine.sha256[:12]})"
        )
        raise MismatchError(
            f"{output} was built {how}. Use the same, build into another folder, or append to it once it is complete."
        )
    if not found.complete:
        raise ExternalMemoryError(
            f"{output} is incomplete, so nothing can be appended to it: run the build that it was begun with again."
        )
    return replace(found, inputs=(*found.inputs, *wanted.inputs), complete=False)


def _with_head(manifest: Manifest, plm: PLM, output: Path) -> Manifest:
    """Save the head bundle beside the shards, unless it lies there whole, and list its files."""
    recover(output / HEAD)

    def listed() -> tuple[FileEntry, ...]:
        files = sorted(path for path in (output / HEAD).rglob("*") if path.is_file())
        return tuple(FileEntry.of(output, path.relative_to(output).as_posix()) for path in files)

    if not manifest.head or listed() != manifest.head:
        plm.head().save(output / HEAD)
        manifest = replace(manifest, head=listed())
        manifest.write(output)
    return manifest


@dataclass(frozen=True)
class Tokens:
    """All examples in token ids, packed: example i is ids[starts[i] : starts[i + 1]], and its target starts at cuts[i].

    Attributes:
        ids: (all tokens,) int32.
        starts: (e + 1,).
        cuts: (e,).
        source_lengths: (e,).
    """

    ids: np.ndarray[tuple[int], np.dtype[np.int32]]
    starts: Integers
    cuts: Integers
    source_lengths: Integers

    @classmethod
    def encode(cls, plm: PLM, template: Template, examples: Sequence[Example]) -> Tokens:
        """Encode and check every example.

        Raises:
            DataError: an example that the PLM cannot read, or whose target is empty; named by its `where`.
        """
        description = plm.description
        packed: list[np.ndarray[tuple[int], np.dtype[np.int32]]] = []
        sizes: list[tuple[int, int, int]] = []
        with console.progress("encoding", len(examples), "examples") as advance:
            for first in range(0, len(examples), ENCODED_AT_ONCE):
                block = examples[first : first + ENCODED_AT_ONCE]
                tokenizer: PreTrainedTokenizerBase = plm.tokenizer
                encoded = template.encode(tokenizer, block)
                for offset, (example, one) in enumerate(zip(block, encoded, strict=True)):
                    where = example.where or f"example {first + offset + 1}"
                    _check(one.prompt, one.target, description, where)
                    packed.append(np.array(one.prompt + one.target, np.int32))
                    sizes.append((len(one.prompt), len(one.target), one.source_length))
                advance(len(block))
        prompts, targets, source_lengths = np.array(sizes, np.int64).T
        starts = np.concatenate([[0], np.cumsum(prompts + targets)])
        return cls(np.concatenate(packed), starts, starts[:-1] + prompts, source_lengths)

    @property
    def target_lengths(self) -> Integers:
        """(e,): n of each example."""
        return self.starts[1:] - self.cuts

    def sequence(self, i: int) -> list[int]:
        """Prompt and target of example i."""
        return [int(token) for token in self.ids[self.starts[i] : self.starts[i + 1]]]

    def prompt(self, i: int) -> list[int]:
        """Prompt of example i."""
        return [int(token) for token in self.ids[self.starts[i] : self.cuts[i]]]

    def target(self, i: int) -> list[int]:
        """Target of example i."""
        return [int(token) for token in self.ids[self.cuts[i] : self.starts[i + 1]]]


def _check(prompt: tuple[int, ...], target: tuple[int, ...], plm: PLMDescription, where: str) -> None:
    if not target:
        raise DataError(f"{where}: the target tokenises to nothing: fill it in, or leave the example out.")
    if len(prompt) + len(target) > plm.max_length:
        raise DataError(
            f"{where}: prompt ({len(prompt):,} tokens) and target ({len(target):,}) are longer than the "
            f"{plm.max_length:,} tokens that {plm.name} reads: shorten the example, or leave it out."
        )
    highest = max(prompt + target)
    if highest >= plm.vocabulary_size:
        raise DataError(
            f"{where}: token {highest} is outside the vocabulary of {plm.name} ({plm.vocabulary_size} tokens): "
            f"tokenizer and PLM do not belong together."
        )


def _groups(tokens: Tokens, first: int, examples_per_shard: int, row_bytes: int) -> Iterator[tuple[int, int]]:
    """Cut the examples from `first` on into groups [start, stop): the next group depends on its start alone."""
    lengths = tokens.target_lengths
    while first < len(lengths):
        filled = np.cumsum(lengths[first : first + examples_per_shard]) * row_bytes
        count = max(1, int(np.searchsorted(filled, SHARD_BYTES, side="right")))
        yield first, first + count
        first += count


def _write_shards(
    manifest: Manifest, plm: PLM, examples: Sequence[Example], tokens: Tokens, output: Path, batch_tokens: int
) -> None:
    """Ask the PLM for one group while the one before it is being written."""
    done = manifest.examples - sum(entry.examples for entry in manifest.inputs[:-1])
    row_bytes = manifest.plm.d_tap * DTYPES[manifest.dtype].itemsize
    lengths = tokens.target_lengths
    pending: Future[Manifest] | None = None
    with (
        console.progress("building", float(lengths[done:].sum()), "tokens") as advance,
        ThreadPoolExecutor(1, "pema-memory-writer") as writer,
    ):
        for start, stop in _groups(tokens, done, manifest.inputs[-1].examples_per_shard, row_bytes):
            answers: list[Represented | None] = [None] * (stop - start)
            for answer in _ask(plm, manifest.contexts, manifest.targets, tokens, start, stop, batch_tokens):
                if not 0 <= answer.index < stop - start or answers[answer.index] is not None:
                    raise OwnerError(
                        f"{manifest.plm.name} answered for sequence {answer.index} of {stop - start} out of turn."
                    )
                answers[answer.index] = answer
                advance(float(lengths[start + answer.index]), f"example {stop:,} of {len(lengths):,}")
            if pending is not None:
                manifest = pending.result()
            pending = writer.submit(_write, manifest, answers, examples, tokens, start, output)
        if pending is not None:
            pending.result()


def _ask(
    plm: PLM, contexts: Contexts, targets: Targets, tokens: Tokens, start: int, stop: int, batch_tokens: int
) -> Iterator[Represented]:
    group = range(start, stop)
    if contexts == "teacher":
        cuts = [int(tokens.cuts[i] - tokens.starts[i]) for i in group]
        return plm.represent([tokens.sequence(i) for i in group], cuts, batch_tokens=batch_tokens)
    prompts = [tokens.prompt(i) for i in group]
    room = plm.description.max_length
    steps = [
        min(steps_for(int(tokens.target_lengths[i]), targets), room - len(prompt))
        for i, prompt in zip(group, prompts, strict=True)
    ]
    return plm.predict(prompts, steps, batch_tokens=batch_tokens)


def steps_for(length: int, targets: Targets) -> int:
    """How far the PLM generates for a target of `length` tokens.

    "aligned" goes on for another quarter of the target: there the adapter learns to end a text that has run too long.
    Both are rounded up, so that the PLM owner learns a target's length only roughly.
    """
    wanted = length + length // 4 if targets == "aligned" else length
    return padded(wanted)


def _write(
    manifest: Manifest,
    answers: Sequence[Represented | None],
    examples: Sequence[Example],
    tokens: Tokens,
    start: int,
    output: Path,
) -> Manifest:
    """Pair, store and write one group; the manifest with its shard."""
    plm = manifest.plm
    golds, rows = [], []
    for i, answer in enumerate(answers, start):
        if answer is None:
            raise OwnerError(f"{plm.name} did not answer for {_name(examples, i)}.")
        gold = pair(
            tokens.target(i),
            None if manifest.contexts == "teacher" else _generated(answer, plm),
            manifest.targets,
        )
        f = answer.representations
        # A teacher context exists for every target token; a predicted one for as long as the PLM went on.
        fits = len(f) == len(gold) if manifest.contexts == "teacher" else len(f) >= len(gold) > 0
        if f.ndim != 2 or f.shape[1] != plm.d_tap or not fits:
            raise OwnerError(
                f"{plm.name} answered for {_name(examples, i)} with representations of shape {tuple(f.shape)}, "
                f"expected ({len(gold)}, {plm.d_tap})."
            )
        golds.append(gold)
        rows.append(f[: len(gold)])
    offsets = np.concatenate([[0], np.cumsum([len(gold) for gold in golds])])

    def where(row: int) -> str:
        return _name(examples, start + int(np.searchsorted(offsets, row, side="right")) - 1)

    stored, scales = store(torch.cat(rows), manifest.dtype, where)
    contents = Contents(
        representations=stored,
        scales=scales,
        targets=torch.from_numpy(np.concatenate(golds)).to(torch.int32),
        example_offsets=torch.from_numpy(offsets),
        source_lengths=torch.from_numpy(tokens.source_lengths[start : start + len(answers)]).to(torch.int32),
    )
    manifest = manifest.add(write_shard(output, len(manifest.shards), contents))
    manifest.write(output)
    return manifest


def _generated(answer: Represented, plm: PLMDescription) -> list[int]:
    generated: Tensor | None = answer.generated
    if generated is None or len(generated) != len(answer.representations):
        raise OwnerError(f"{plm.name} did not hand out one generated token for each predicted context.")
    return [int(token) for token in generated.tolist()]


def _name(examples: Sequence[Example], i: int) -> str:
    return examples[i].where or f"example {i + 1}"
