"""Building an external memory: step 1 of PEMA, on the data owner's side of the boundary.

A build processes the examples in groups, one shard per group. The groups depend only on the input and the settings.
The manifest is rewritten after each shard, and both are written atomically. Answers of the PLM that are not in a shard
yet are in a journal. So a killed build resumes after the last answers that it wrote, and produces the same bytes as an
uninterrupted build.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np

from pema import console
from pema.cluster.replicas import Replicas
from pema.errors import ConfigError, DataError, ExternalMemoryError, MismatchError
from pema.locks import exclusive
from pema.memory.config import BuildConfig
from pema.memory.encoder import Encoder
from pema.memory.encoding import Tokens
from pema.memory.engines.in_process import Work
from pema.memory.engines.launched import Team
from pema.memory.engines.ray import write_with
from pema.memory.groups import Group
from pema.memory.journal import Journal, clear_journals
from pema.memory.manifest import FILE, HEAD, FileEntry, Input, Manifest, require_path
from pema.memory.places import MEMORY, require_folder
from pema.memory.planning import Plan
from pema.memory.reader import Memory
from pema.memory.register import Register, clear_receipts, read_receipts
from pema.memory.shard import ShardFile
from pema.owner.contract import PLM, Metered, require_open
from pema.processes import join
from pema.schema import known
from pema.storage.publishing import destination
from pema.tasks.example import Example, one_target_each
from pema.tasks.registry import Task, chosen_task
from pema.tasks.target_statistics import TargetStatistics

if TYPE_CHECKING:
    from pema.tasks.template import Template

DEFAULT = BuildConfig()


@runtime_checkable
class FollowsPolicy(Protocol):
    """A PLM whose `predicted` contexts follow the text of an adapter; see `pema.generation.on_policy`."""

    @property
    def policy(self) -> str:
        """Digest of the adapter."""


def build_memory(
    plm: PLM | Replicas,
    examples: Iterable[Example],
    task: str | Task,
    output: Path | str,
    config: BuildConfig = DEFAULT,
    *,
    append: bool = False,
    **changes: Any,  # noqa: ANN401
) -> Memory:
    """Store (f(c_i), y_i) for every target token of every example.

    Called in each of several processes that a launcher has started (`pema.processes`), it builds one memory in all of
    them, on a file system that they share: its files are those of one process.

    Called again with the same arguments, it resumes where it was interrupted; if the memory is complete, it is
    returned unchanged. All examples are encoded and checked before the first request to the PLM.

    Args:
        plm: the frozen language model; or `OnPolicy`, for the contexts that an adapter reaches; or `replicas` of a PLM
            on a Ray cluster.
        examples: the pairs of texts; each of several targets of a source (`Example.alternatives`) is a pair.
        task: the task or its name; its template builds the prompts. If it leaves open whether they are a chat, those of
            a memory in `output` decide, or else the PLM's tokenizer.
        output: folder of the memory, or its address in object storage: it is then built on the local disk, and
            published once it is complete (`pema.storage.publishing.destination`).
        config: the settings; `batch_tokens` may change when a build is resumed.
        append: whether to add the examples to a complete memory.
        changes: fields of `BuildConfig` that override those of `config`.

    Returns:
        The complete memory, opened.

    Raises:
        ConfigError: invalid settings; `teacher` contexts of an adapter; `output` contains something else; several
            processes have no common folder; a value is too large for `dtype`, or `dtype` raises the perplexity of the
            PLM by more than `precision.MOST`.
        DataError: there are no examples, or one cannot be used (named by `Example.where`).
        MismatchError: the memory in `output` was started with another PLM, setting or input.
        ExternalMemoryError: the memory in `output` is damaged, or incomplete and cannot be appended to.
        OwnerError: the PLM's answer does not match the request.
        StorageError: a write failed, or another process builds in `output`; files written before stay valid.
    """
    known(BuildConfig, changes)
    require_open(plm)
    config, task = replace(config, **changes), chosen_task(task)
    examples = list(one_target_each(islice(examples, config.limit)))
    if not examples:
        raise DataError("there are no examples to build a memory from: check the input files.")
    processes = join()
    require_folder(output, processes)
    if processes.count > 1 and isinstance(plm, Replicas):
        raise ConfigError(f"replicas on a Ray cluster with {processes.count} processes: start one, without a launcher.")
    with Team(processes) as team:
        if team.processes.is_writer:
            with destination(output, MEMORY) as folder:
                _lead(plm, examples, task, folder, config, append, team)
        elif not isinstance(plm, Replicas):
            _follow(plm, examples, task, config, team)
        team.finish()
    return Memory.open(output)


def _lead(
    plm: PLM | Replicas,
    examples: Sequence[Example],
    task: Task,
    output: Path,
    config: BuildConfig,
    append: bool,
    team: Team,
) -> None:
    """Begin the memory, or take it up, write this process's share of its shards and enter all."""
    template = _settled(task.template, plm, output)
    team.say("chat", template.chat)
    wanted = _wanted(plm, examples, task, template, config)
    require_path(output, append=append)
    with exclusive(output, private=True):
        manifest = _begin(wanted, output, append)
        if config.contexts == "teacher" and wanted.inputs[0].policy is not None and len(manifest.inputs) == 1:
            raise ConfigError(
                "contexts='teacher' of an adapter's text: it is appended to a memory of the targets' contexts. Build "
                "that first, or use contexts='predicted'."
            )
        clear_journals(output, len(manifest.shards))
        clear_receipts(output, len(manifest.shards))
        if manifest.complete:
            console.note(f"{output} already contains these {len(examples):,} examples: nothing to do.")
            team.begin(Register(output, manifest, {}), ())
            return
        tokens = Tokens.encode(plm, template, examples, apart=config.contexts == "predicted")
        targets = (example.target for example in examples)
        manifest = manifest.with_statistics(TargetStatistics.of(tokens.target_lengths, targets))
        shards = [ShardFile(output, entry, manifest) for entry in manifest.shards]
        for shard in shards:  # never extend a damaged memory
            shard.require_whole()
        plan = Plan.of(manifest.asked, tokens, plm.description.max_length)
        groups = dict(enumerate(plan.groups(), len(manifest.shards)))
        waiting = read_receipts(output, manifest, groups)
        remaining = {index: group for index, group in groups.items() if index not in waiting}
        _forecast(manifest, plm, examples, plan, remaining, output)
        manifest.write(output)
        manifest = _with_head(manifest, plm, output)
        team.begin(Register(output, manifest, waiting), list(remaining))
        with console.progress("building", float(plan.tokens.sum()), "tokens") as show:
            written = np.delete(plan.tokens, [i for group in remaining.values() for i in group])
            show(float(written.sum()), earlier=True)
            team.showing(show)
            _work(plm, examples, tokens, plan, remaining, config, team)
            team.complete()


def _follow(plm: PLM, examples: Sequence[Example], task: Task, config: BuildConfig, team: Team) -> None:
    """Write the share of a process that is not the writer."""
    template, chat = task.template, team.hear("chat")
    template = (template if template.chat == chat else replace(template, chat=chat)).settled(plm.tokenizer)
    wanted = _wanted(plm, examples, task, template, config)
    tokens = Tokens.encode(plm, template, examples, apart=config.contexts == "predicted")
    register = team.join()
    manifest, what = register.manifest, f"the memory of process 0, seen from process {team.processes.rank},"
    wanted.require_same(manifest, what)
    if manifest.inputs[-1] != wanted.inputs[0]:
        raise MismatchError(f"{what} is built from another input: give all processes the same arguments.")
    plan = Plan.of(manifest.asked, tokens, plm.description.max_length)
    _work(plm, examples, tokens, plan, dict(enumerate(plan.groups(), len(manifest.shards))), config, team)
    team.complete()


def _work(
    plm: PLM | Replicas,
    examples: Sequence[Example],
    tokens: Tokens,
    plan: Plan,
    groups: Mapping[int, range],
    config: BuildConfig,
    team: Team,
) -> None:
    """Write this process's share of the shards."""
    share = (Group.of(index, group, tokens, plan, examples) for index, group in team.share(groups))
    if isinstance(plm, Replicas):
        write_with(plm, share, config.batch_tokens, team)
    else:
        encoder = Encoder(plm, team.register.manifest, config.batch_tokens)
        Work(encoder, team, len(examples)).do(share)


def _wanted(
    plm: PLM | Replicas, examples: Sequence[Example], task: Task, template: Template, config: BuildConfig
) -> Manifest:
    """Return the manifest of a memory of these examples, without content."""
    policy = plm.policy if isinstance(plm, FollowsPolicy) else None
    return Manifest(
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


def _forecast(
    manifest: Manifest,
    plm: PLM | Replicas,
    examples: Sequence[Example],
    plan: Plan,
    remaining: Mapping[int, range],
    output: Path,
) -> None:
    """Refuse what the PLM's owner does not allow, and say what the rest of the build takes of its quotas."""
    if not isinstance(plm, Metered):
        return

    def answered(index: int, group: range) -> list[int]:
        # Replicas do not see the journals of a build in this process, and ask for whole groups.
        return [] if isinstance(plm, Replicas) else list(Journal(output, index, group, manifest.asked).answers)

    left = [i for index, group in remaining.items() for i in np.delete(group, answered(index, group))]
    notes = plm.forecast(manifest.asked.contexts, plan.tokens[left].tolist())
    replies = sum(any(turn.role == "assistant" for turn in example.history) for example in examples)
    if manifest.contexts == "predicted" and replies:
        notes.append(
            f"{replies:,} examples have earlier replies in their history: these are part of the prompts, so the PLM's "
            "owner sees them."
        )
    for text in notes:
        console.note(text)


def _settled(template: Template, plm: PLM | Replicas, output: Path) -> Template:
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


def _with_head(manifest: Manifest, plm: PLM | Replicas, output: Path) -> Manifest:
    """Save the head bundle next to the shards, unless it is already complete, and list its files."""

    def listed() -> tuple[FileEntry, ...]:
        files = sorted(path for path in (output / HEAD).rglob("*") if path.is_file())
        return tuple(FileEntry.of(output, path.relative_to(output).as_posix()) for path in files)

    if not manifest.head or listed() != manifest.head:
        plm.head().save(output / HEAD)
        manifest = replace(manifest, head=listed())
        manifest.write(output)
    return manifest
