"""Building an external memory: step 1 of PEMA, on the data owner's side of the boundary.

A build processes the examples in groups, one shard per group. The groups depend only on the input and the settings.
The manifest is rewritten after each shard, and both are written atomically. Answers of the PLM that are not in a shard
yet are in a journal. So a killed build resumes after the last answers that it wrote, and produces the same bytes as an
uninterrupted build.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from pema import console
from pema.errors import (
    ConfigError,
    DataError,
    ExternalMemoryError,
    MismatchError,
    OwnerError,
    PemaError,
    StorageError,
)
from pema.locks import exclusive
from pema.memory.config import BuildConfig
from pema.memory.encoding import Tokens
from pema.memory.journal import Journal, clear_journals
from pema.memory.manifest import FILE, HEAD, FileEntry, Input, Manifest, require_path
from pema.memory.pairing import NO_TARGET, agreeing, pair
from pema.memory.places import MEMORY
from pema.memory.planning import Plan
from pema.memory.precision import StorageLoss
from pema.memory.reader import Memory
from pema.memory.shard import (
    Contents,
    ShardFile,
    StoredPrompts,
    channel_scales_of,
    restore,
    store,
    write_shard,
)
from pema.owner.contract import PLM, ContextRepresentations, Contexts, Metered, PLMDescription
from pema.schema import known
from pema.storage.publishing import destination
from pema.tasks.example import Example, one_target_each
from pema.tasks.spelling import Speller, speller_of
from pema.tasks.target_statistics import TargetStatistics

if TYPE_CHECKING:
    from pema.tasks.registry import Task
    from pema.tasks.template import Template

DEFAULT = BuildConfig()

LEAST_AGREEMENT = 0.15
"""Share of tokens on which the PLM's own text and the target agree; `predicted` contexts with less are warned of.

It lies between what was measured (docs/memory-format.md): 23 to 68 % for translation and rewriting, 5 to 7 % for texts
that the PLM alone does not write."""


@runtime_checkable
class FollowsPolicy(Protocol):
    """A PLM whose `predicted` contexts follow the text of an adapter; see `pema.generation.on_policy`."""

    @property
    def policy(self) -> str:
        """Digest of the adapter."""


def build_memory(
    plm: PLM,
    examples: Iterable[Example],
    task: Task,
    output: Path | str,
    config: BuildConfig = DEFAULT,
    *,
    append: bool = False,
    **changes: Any,  # noqa: ANN401
) -> Memory:
    """Store (f(c_i), y_i) for every target token of every example.

    Called again with the same arguments, it resumes where it was interrupted; if the memory is complete, it is
    returned unchanged. All examples are encoded and checked before the first request to the PLM.

    Args:
        plm: the frozen language model; or `OnPolicy`, for the contexts that an adapter reaches.
        examples: the pairs of texts; each of several targets of a source (`Example.alternatives`) is a pair.
        task: its template builds the prompts. If it leaves open whether they are a chat, those of a memory in `output`
            decide, or else the PLM's tokenizer.
        output: folder of the memory, or its address in object storage: it is then built on the local disk, and
            published once it is complete (`pema.storage.publishing.destination`).
        config: the settings; `batch_tokens` may change when a build is resumed.
        append: whether to add the examples to a complete memory.
        changes: fields of `BuildConfig` that override those of `config`.

    Returns:
        The complete memory, opened.

    Raises:
        ConfigError: invalid settings; `teacher` contexts of an adapter; `output` contains something else; a value is
            too large for `dtype`, or `dtype` raises the perplexity of the PLM by more than `precision.MOST`.
        DataError: there are no examples, or one cannot be used (named by `Example.where`).
        MismatchError: the memory in `output` was started with another PLM, setting or input.
        ExternalMemoryError: the memory in `output` is damaged, or incomplete and cannot be appended to.
        OwnerError: the PLM's answer does not match the request.
        StorageError: a write failed, or another process builds in `output`; files written before stay valid.
    """
    known(BuildConfig, changes)
    config = replace(config, **changes)
    with destination(output, MEMORY) as folder:
        _build(plm, examples, task, folder, config, append)
    return Memory.open(output)


def _build(plm: PLM, examples: Iterable[Example], task: Task, output: Path, config: BuildConfig, append: bool) -> None:
    examples = list(one_target_each(islice(examples, config.limit)))
    if not examples:
        raise DataError("there are no examples to build a memory from: check the input files.")
    template = _settled(task.template, plm, output)
    policy = plm.policy if isinstance(plm, FollowsPolicy) else None
    wanted = Manifest(
        plm=plm.description,
        task=task.name,
        template=template.text,
        chat_template=template.chat_template(plm.tokenizer),
        system=template.system,
        contexts=config.contexts,
        targets=config.targets,
        dtype=config.dtype,
        inputs=(Input.of(examples, config.examples_per_shard, policy),),
    )
    require_path(output, append=append)
    with exclusive(output, private=True):
        manifest = _begin(wanted, output, append)
        if config.contexts == "teacher" and policy is not None and len(manifest.inputs) == 1:
            raise ConfigError(
                "contexts='teacher' of an adapter's text: it is appended to a memory of the targets' contexts. Build "
                "that first, or use contexts='predicted'."
            )
        clear_journals(output, len(manifest.shards))
        if manifest.complete:
            console.note(f"{output} already contains these {len(examples):,} examples: nothing to do.")
            return
        tokens = Tokens.encode(plm, template, examples, apart=config.contexts == "predicted")
        targets = (example.target for example in examples)
        manifest = manifest.with_statistics(TargetStatistics.of(tokens.target_lengths, targets))
        shards = [ShardFile(output, entry, manifest) for entry in manifest.shards]
        for shard in shards:  # never extend a damaged memory
            shard.require_whole()
        _forecast(manifest, plm, examples, tokens, output)
        manifest.write(output)
        manifest = _with_head(manifest, plm, output)
        _write_shards(manifest, plm, examples, tokens, output, config.batch_tokens)


def _forecast(manifest: Manifest, plm: PLM, examples: Sequence[Example], tokens: Tokens, output: Path) -> None:
    """Refuse what the PLM's owner does not allow, and say what the rest of the build takes of its quotas."""
    if not isinstance(plm, Metered):
        return
    asked = manifest.asked
    plan = Plan.of(asked, tokens, plm.description.max_length)
    group = next(plan.groups(), range(0))
    answered = [group[i] for i in Journal(output, len(manifest.shards), group, asked).answers]
    notes = plm.forecast(asked.contexts, np.delete(plan.tokens, [*range(plan.done), *answered]).tolist())
    replies = sum(any(turn.role == "assistant" for turn in example.history) for example in examples)
    if manifest.contexts == "predicted" and replies:
        notes.append(
            f"{replies:,} examples have earlier replies in their history: these are part of the prompts, so the PLM's "
            "owner sees them."
        )
    for text in notes:
        console.note(text)


def _settled(template: Template, plm: PLM, output: Path) -> Template:
    """Return the template with a choice between chat and plain prompts, by default that of `output`."""
    if template.chat is None and template.system is None and (output / FILE).exists():
        template = replace(template, chat=Manifest.read(output).chat_template is not None)
    return template.settled(plm.tokenizer)


def _begin(wanted: Manifest, output: Path, append: bool) -> Manifest:
    """Return the manifest to start from: a new one, that of an interrupted build, or a complete one to append to."""
    require_path(output, append=append)
    if not (output / FILE).exists():
        return wanted
    existing = Manifest.read(output)
    wanted.require_same(existing, str(output))
    if existing.inputs[-1] == wanted.inputs[0]:
        return existing
    if not append:
        current, previous = wanted.inputs[0], existing.inputs[-1]
        how = (
            f"with examples_per_shard={previous.examples_per_shard}, here it is {current.examples_per_shard}"
            if replace(current, examples_per_shard=previous.examples_per_shard) == previous
            else f"with {_text_of(previous)}, here it is {_text_of(current)}"
            if replace(current, policy=previous.policy) == previous
            else f"from another input ({previous.examples:,} examples, digest {previous.sha256[:12]}; "
            f"here {current.examples:,}, digest {current.sha256[:12]})"
        )
        raise MismatchError(
            f"{output} was built {how}. Use the same, build into another folder, or append to it once it is complete."
        )
    if not existing.complete:
        raise ExternalMemoryError(
            f"{output} is incomplete, so nothing can be appended to it: run the build that started it again."
        )
    return replace(existing, inputs=(*existing.inputs, *wanted.inputs), complete=False)


def _text_of(given: Input) -> str:
    """Return who wrote the text of the contexts of an input, for messages."""
    return "the PLM's own text" if given.policy is None else f"the text of the adapter {given.policy[:12]}"


def _with_head(manifest: Manifest, plm: PLM, output: Path) -> Manifest:
    """Save the head bundle next to the shards, unless it is already complete, and list its files."""

    def listed() -> tuple[FileEntry, ...]:
        files = sorted(path for path in (output / HEAD).rglob("*") if path.is_file())
        return tuple(FileEntry.of(output, path.relative_to(output).as_posix()) for path in files)

    if not manifest.head or listed() != manifest.head:
        plm.head().save(output / HEAD)
        manifest = replace(manifest, head=listed())
        manifest.write(output)
    return manifest


def _write_shards(
    manifest: Manifest, plm: PLM, examples: Sequence[Example], tokens: Tokens, output: Path, batch_tokens: int
) -> None:
    """Request one group from the PLM while the previous one is being written."""
    asked = manifest.asked
    plan = Plan.of(asked, tokens, plm.description.max_length)
    loss, speller = StorageLoss(plm.head(), manifest.dtype), speller_of(plm.tokenizer)
    pending: Future[Manifest] | None = None
    with (
        console.progress("building", float(plan.tokens.sum()), "tokens") as advance,
        ThreadPoolExecutor(1, "pema-memory-writer") as writer,
    ):
        advance(float(plan.tokens[: plan.done].sum()), earlier=True)
        for index, group in enumerate(plan.groups(), len(manifest.shards)):
            start, stop = group.start, group.stop
            journal = Journal(output, index, group, asked)
            answers: list[ContextRepresentations | None] = [journal.answers.get(i) for i in range(stop - start)]
            if journal.answers:
                console.note(f"{start + len(journal.answers):,} of {len(examples):,} examples were answered before.")
                advance(float(plan.tokens[start:stop][list(journal.answers)].sum()), earlier=True)
            for answer in _answers(plm, asked, tokens, plan, group, batch_tokens, journal):
                answers[answer.index] = answer
                advance(float(plan.tokens[start + answer.index]), f"example {stop:,} of {len(examples):,}")
            if pending is not None:
                manifest = pending.result()
            pending = writer.submit(_write, manifest, answers, examples, tokens, start, output, loss, speller, journal)
        if pending is not None:
            pending.result()


def _answers(
    plm: PLM, manifest: Manifest, tokens: Tokens, plan: Plan, group: range, batch_tokens: int, journal: Journal
) -> Iterator[ContextRepresentations]:
    """Yield the answers for a group that are missing from the journal, and write them into it, however this ends."""
    answered = set(journal.answers)
    if len(answered) == len(group):
        return
    try:
        for answer in _ask(plm, manifest.contexts, tokens, plan, group, batch_tokens, frozenset(answered)):
            if not 0 <= answer.index < len(group) or answer.index in answered:
                raise OwnerError(
                    f"{manifest.plm.name} answered for sequence {answer.index} of {len(group)}, "
                    "which was not requested or was already answered."
                )
            answered.add(answer.index)
            journal.add(answer)
            yield answer
    except BaseException:
        with contextlib.suppress(StorageError):
            journal.flush()
        raise


def _ask(
    plm: PLM,
    contexts: Contexts,
    tokens: Tokens,
    plan: Plan,
    group: range,
    batch_tokens: int,
    skip: frozenset[int],
) -> Iterator[ContextRepresentations]:
    if contexts == "teacher":
        cuts = [int(tokens.cuts[i] - tokens.starts[i]) for i in group]
        return plm.represent([tokens.sequence(i) for i in group], cuts, batch_tokens=batch_tokens, skip=skip)
    steps = plan.contexts[group.start : group.stop].tolist()
    return plm.predict([tokens.prompt(i) for i in group], steps, batch_tokens=batch_tokens, skip=skip)


def _write(
    manifest: Manifest,
    answers: Sequence[ContextRepresentations | None],
    examples: Sequence[Example],
    tokens: Tokens,
    start: int,
    output: Path,
    loss: StorageLoss,
    speller: Speller,
    journal: Journal,
) -> Manifest:
    """Write one group as a shard, and return the manifest with it."""
    try:
        contents = _contents(manifest, answers, examples, tokens, start, output, loss, speller)
    except PemaError:  # the PLM may answer differently next time: in float32, or with another server
        journal.remove()
        raise
    manifest = manifest.add(write_shard(output, len(manifest.shards), contents))
    manifest.write(output)
    journal.remove()
    if len(manifest.shards) == 1:
        _warn(manifest)
    return manifest


def _warn(manifest: Manifest) -> None:
    """Warn if the PLM's own texts have too little in common with the targets for `predicted` contexts."""
    share = manifest.agreement
    if manifest.inputs[0].policy is None and share is not None and share < LEAST_AGREEMENT:
        console.note(
            f"The PLM's own texts agree with the targets on {share:.0%} of their tokens, less than "
            f"{LEAST_AGREEMENT:.0%}: predicted contexts teach little here. If the PLM's owner may see the targets, "
            "build with teacher contexts."
        )


def _contents(
    manifest: Manifest,
    answers: Sequence[ContextRepresentations | None],
    examples: Sequence[Example],
    tokens: Tokens,
    start: int,
    output: Path,
    loss: StorageLoss,
    speller: Speller,
) -> Contents:
    """Pair the answers for one group with their targets, and convert them to the storage type."""
    plm, asked = manifest.plm, manifest.asked
    teacher = asked.contexts == "teacher"
    golds, rows, texts, agree = [], [], [], 0
    for i, answer in enumerate(answers, start):
        if answer is None:
            raise OwnerError(f"{plm.name} did not answer for {_name(examples, i)}.")
        generated = None if teacher else _generated(answer, plm)
        gold = pair(tokens.target(i), generated, asked.targets)
        if generated is not None:
            agree += agreeing(tokens.target(i), generated[: len(gold)])
        f = answer.representations
        # A teacher context exists for every target token, a predicted one only until the PLM ends the text.
        fits = len(f) == len(gold) if teacher else len(f) >= len(gold) > 0
        if f.ndim != 2 or f.shape[1] != plm.d_tap or not fits:
            raise OwnerError(
                f"{plm.name} answered for {_name(examples, i)} with representations of shape {tuple(f.shape)}, "
                f"expected ({len(gold)}, {plm.d_tap})."
            )
        golds.append(gold)
        if generated is not None:
            texts += generated[: len(gold)]
        rows.append(f[: len(gold)])
    offsets = np.concatenate([[0], np.cumsum([len(gold) for gold in golds])])

    def where(row: int) -> str:
        return _name(examples, start + int(np.searchsorted(offsets, row, side="right")) - 1)

    f = torch.cat(rows)
    channel_scales = _channel_scales(manifest, f, output)
    stored, scales = store(f, manifest.dtype, where, channel_scales)
    targets = torch.from_numpy(np.concatenate(golds))
    measured = loss.sample((targets != NO_TARGET).nonzero()[:, 0])
    read = restore(stored[measured], None if scales is None else scales[measured], channel_scales)
    loss.add(f[measured], read, targets[measured])
    return Contents(
        representations=stored,
        scales=scales,
        channel_scales=channel_scales,
        targets=targets.to(torch.int32),
        example_offsets=torch.from_numpy(offsets),
        source_lengths=torch.from_numpy(tokens.source_lengths[start : start + len(answers)]).to(torch.int32),
        agreeing=None if teacher else agree,
        on_policy=asked is not manifest,
        sources=None if tokens.sources is None else torch.from_numpy(tokens.sources[start : start + len(answers)]),
        prompts=_prompts(tokens, range(start, start + len(answers)), speller, None if teacher else texts),
    )


def _prompts(tokens: Tokens, group: range, speller: Speller, texts: Sequence[int] | None) -> StoredPrompts:
    """Return the tokens of the prompts of a group, whose `predicted` contexts end with `texts`."""
    prompts = [tokens.prompt(i) for i in group]
    spelled = [spelling for prompt in prompts for spelling in speller(prompt)]
    return StoredPrompts(
        tokens=np.concatenate([np.array(prompt, np.int32) for prompt in prompts]),
        spellings=np.array([spelling.token for spelling in spelled], np.int32),
        spans=np.array([spelling.span for spelling in spelled], np.uint8),
        offsets=np.cumsum([0, *map(len, prompts)]).astype(np.int64),
        written=None if texts is None else np.array(texts, np.int32),
    )


def _channel_scales(manifest: Manifest, f: Tensor, output: Path) -> Tensor | None:
    """Return the channel scales of the memory's first shard (int8 only), so that all shards have the same."""
    if manifest.dtype != "int8":
        return None
    if manifest.shards:
        return ShardFile(output, manifest.shards[0], manifest).channel_scales
    return channel_scales_of(f)


def _generated(answer: ContextRepresentations, plm: PLMDescription) -> list[int]:
    generated: Tensor | None = answer.generated
    if generated is None or len(generated) != len(answer.representations):
        raise OwnerError(f"{plm.name} did not return one generated token per predicted context.")
    return [int(token) for token in generated.tolist()]


def _name(examples: Sequence[Example], i: int) -> str:
    return examples[i].where or f"example {i + 1}"
