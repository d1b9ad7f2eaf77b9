"""Building an external memory: step 1 of PEMA, on the data owner's side of the boundary.

A run is a sequence of groups of examples, and which examples make up a group depends on the input and the settings
alone. One group is one shard. The manifest is rewritten after each shard, and both are whole or absent, so a run that
is killed goes on behind its last whole shard and ends with the bytes of a run that was not.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from pema import console
from pema.errors import ConfigError, DataError, ExternalMemoryError, MismatchError, OwnerError
from pema.files import clear_below
from pema.locks import exclusive
from pema.memory.config import BuildConfig, Targets
from pema.memory.encoding import Tokens
from pema.memory.manifest import FILE, HEAD, ITEM_BYTES, FileEntry, Input, Manifest
from pema.memory.pairing import pair
from pema.memory.precision import StorageLoss
from pema.memory.reader import Memory
from pema.memory.shard import Contents, Integers, ShardFile, channel_scales_of, restore, store, write_shard
from pema.owner.contract import PLM, Contexts, PLMDescription, Represented, padded
from pema.schema import known
from pema.tasks.example import Example

if TYPE_CHECKING:
    from pema.tasks.registry import Task

DEFAULT = BuildConfig()

SHARD_BYTES = 1 << 27
"""A group ends before its representations would take more than this, so that wide PLMs do not fill the RAM."""


def build_memory(
    plm: PLM,
    examples: Iterable[Example],
    task: Task,
    output: Path,
    config: BuildConfig = DEFAULT,
    *,
    append: bool = False,
    **changes: Any,  # noqa: ANN401
) -> Memory:
    """Store (f(c_i), y_i) for every target token of every example.

    Started again with the same arguments, it goes on where it was interrupted; where nothing is left to do, it
    returns the memory as it is. All examples are encoded and checked before the PLM is asked for anything.

    Args:
        plm: the frozen language model.
        examples: the pairs of texts.
        task: its template makes the prompts.
        output: folder of the memory.
        config: the settings; `batch_tokens` may differ when a build is taken up again.
        append: add the examples to a complete memory.
        changes: fields of `BuildConfig` that differ from `config`.

    Returns:
        The complete memory, opened.

    Raises:
        ConfigError: settings that cannot be meant; a folder that holds something else; a value too large for `dtype`,
            or a `dtype` that loses more than `precision.MOST` of these representations.
        DataError: no examples; an example that cannot be used (named by `Example.where`).
        MismatchError: the folder's memory was begun with another PLM, setting or input.
        ExternalMemoryError: the folder's memory is damaged, or incomplete where it is to be appended to.
        OwnerError: the PLM did not hand out what it was asked for.
        StorageError: the disk refused a write, or another process builds in the folder; the shards written so far stay
            valid.
    """
    known(BuildConfig, changes)
    config = replace(config, **changes)
    output = Path(output)
    examples = list(examples)[: config.limit]
    if not examples:
        raise DataError("there are no examples to build a memory from: check the input files.")
    wanted = Manifest(
        plm=plm.description,
        task=task.name,
        template=task.template.text,
        contexts=config.contexts,
        targets=config.targets,
        dtype=config.dtype,
        inputs=(Input.of(examples, config.examples_per_shard),),
    )
    if output.exists() and not output.is_dir():
        raise ConfigError(f"{output} is a file: choose a folder for the memory.")
    with exclusive(output, private=True):
        manifest = _begin(wanted, output, append)
        if manifest.complete:
            console.note(f"{output} already holds these {len(examples):,} examples: nothing to do.")
            return Memory.open(output)
        tokens = Tokens.encode(plm, task.template, examples, apart=config.contexts == "predicted")
        shards = [ShardFile(output, entry, manifest) for entry in manifest.shards]
        for shard in shards:  # what is damaged is not built upon
            shard.require_whole()
        manifest.write(output)
        manifest = _with_head(manifest, plm, output)
        _write_shards(manifest, plm, examples, tokens, output, config.batch_tokens)
    return Memory.open(output)


def _begin(wanted: Manifest, output: Path, append: bool) -> Manifest:
    """The manifest that this run starts from: a new one, that of an interrupted run, or a complete one to append to."""
    clear_below(output)
    if not (output / FILE).exists():
        if append:
            raise ConfigError(f"{output} is not a memory, so nothing can be appended to it: build it without append.")
        if any(output.iterdir()):
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

    def listed() -> tuple[FileEntry, ...]:
        files = sorted(path for path in (output / HEAD).rglob("*") if path.is_file())
        return tuple(FileEntry.of(output, path.relative_to(output).as_posix()) for path in files)

    if not manifest.head or listed() != manifest.head:
        plm.head().save(output / HEAD)
        manifest = replace(manifest, head=listed())
        manifest.write(output)
    return manifest


def _groups(lengths: Integers, first: int, examples_per_shard: int, row_bytes: int) -> Iterator[tuple[int, int]]:
    """Cut the examples from `first` on into groups [start, stop): the next group depends on its start alone."""
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
    row_bytes = manifest.plm.d_tap * ITEM_BYTES[manifest.dtype]
    lengths = tokens.target_lengths
    loss = StorageLoss(plm.head(), manifest.dtype)
    pending: Future[Manifest] | None = None
    with (
        console.progress("building", float(lengths[done:].sum()), "tokens") as advance,
        ThreadPoolExecutor(1, "pema-memory-writer") as writer,
    ):
        # Whoever runs the PLM sees how many are asked for together, so that must not tell more than what is asked for.
        asked = (
            lengths if manifest.contexts == "teacher" else _steps(plm, manifest.targets, tokens, range(len(lengths)))
        )
        for start, stop in _groups(asked, done, manifest.inputs[-1].examples_per_shard, row_bytes):
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
            pending = writer.submit(_write, manifest, answers, examples, tokens, start, output, loss)
        if pending is not None:
            pending.result()


def _ask(
    plm: PLM, contexts: Contexts, targets: Targets, tokens: Tokens, start: int, stop: int, batch_tokens: int
) -> Iterator[Represented]:
    group = range(start, stop)
    if contexts == "teacher":
        cuts = [int(tokens.cuts[i] - tokens.starts[i]) for i in group]
        return plm.represent([tokens.sequence(i) for i in group], cuts, batch_tokens=batch_tokens)
    steps = [int(count) for count in _steps(plm, targets, tokens, group)]
    return plm.predict([tokens.prompt(i) for i in group], steps, batch_tokens=batch_tokens)


def _steps(plm: PLM, targets: Targets, tokens: Tokens, group: range) -> Integers:
    """(len(group),): how far the PLM generates for each example."""
    rooms = plm.description.max_length - (tokens.cuts - tokens.starts[:-1])[group.start : group.stop]
    wanted = [steps_for(int(length), targets) for length in tokens.target_lengths[group.start : group.stop]]
    steps: Integers = np.minimum(np.array(wanted, np.int64), rooms)
    return steps


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
    loss: StorageLoss,
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

    f = torch.cat(rows)
    channel_scales = _channel_scales(manifest, f, output)
    stored, scales = store(f, manifest.dtype, where, channel_scales)
    targets = torch.from_numpy(np.concatenate(golds))
    loss.add(f, restore(stored, scales, channel_scales), targets)
    contents = Contents(
        representations=stored,
        scales=scales,
        channel_scales=channel_scales,
        targets=targets.to(torch.int32),
        example_offsets=torch.from_numpy(offsets),
        source_lengths=torch.from_numpy(tokens.source_lengths[start : start + len(answers)]).to(torch.int32),
    )
    manifest = manifest.add(write_shard(output, len(manifest.shards), contents))
    manifest.write(output)
    return manifest


def _channel_scales(manifest: Manifest, f: Tensor, output: Path) -> Tensor | None:
    """With int8, those of the memory's first shard, so that all its shards have the same."""
    if manifest.dtype != "int8":
        return None
    if manifest.shards:
        return ShardFile(output, manifest.shards[0], manifest).channel_scales
    return channel_scales_of(f)


def _generated(answer: Represented, plm: PLMDescription) -> list[int]:
    generated: Tensor | None = answer.generated
    if generated is None or len(generated) != len(answer.representations):
        raise OwnerError(f"{plm.name} did not hand out one generated token for each predicted context.")
    return [int(token) for token in generated.tolist()]


def _name(examples: Sequence[Example], i: int) -> str:
    return examples[i].where or f"example {i + 1}"
