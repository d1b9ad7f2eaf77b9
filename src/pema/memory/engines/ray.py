"""A build on a Ray cluster: replicas of the PLM make the shards, and this process writes them.

A replica gets a group and returns the bytes of its shard, so that only this process needs the memory's folder. What is
written is in the folder as in every build: the same call resumes, with Ray or without.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from torch import Tensor

from pema.cluster.replicas import Replicas
from pema.cluster.worker import Answer
from pema.files import discard
from pema.memory.encoder import Encoder
from pema.memory.groups import Group
from pema.memory.journal import journal_name
from pema.memory.manifest import Manifest, ShardEntry
from pema.memory.shard import packed, write_packed
from pema.owner.contract import PLM, ContextRepresentations
from pema.schema import from_json

if TYPE_CHECKING:
    from pema.memory.engines.launched import Team


@dataclass(frozen=True)
class Job:
    """What all groups of a build have in common: its manifest without shards (JSON), and the tokens of a batch."""

    manifest: dict[str, Any]
    batch_tokens: int | None


@contextlib.contextmanager
def encoding(plm: PLM, job: Job) -> Iterator[Callable[[Group, Tensor | None], Answer]]:
    """Yield a function of a group and the channel scales that makes its shard: its entry, and its bytes."""
    encoder = Encoder(plm, Manifest.from_dict(job.manifest), job.batch_tokens)

    def encode(group: Group, scales: Tensor | None) -> Answer:
        answers: list[ContextRepresentations | None] = [None] * len(group)
        for answer in encoder.answers(group):
            answers[answer.index] = answer
        entry, data = packed(group.index, encoder.contents(group, answers, scales))
        return {"entry": entry.to_dict(), "data": data}

    yield encode


def write_with(replicas: Replicas, groups: Iterable[Group], batch_tokens: int | None, team: Team) -> None:
    """Write the shards of the groups.

    Raises:
        PemaError: see `build_memory`.
        ProcessError: a group ended several actors, or there are none left.
    """
    register = team.register

    def arguments(group: Group) -> tuple[Group, Tensor | None] | None:
        scales = register.channel_scales
        # The first shard of int8 determines the scales of all.
        waits = register.manifest.dtype == "int8" and scales is None and group.index > 0
        return None if waits else (group, scales)

    made = replicas.work(
        encoding,
        Job(replace(register.manifest, shards=(), complete=False).to_dict(), batch_tokens),
        groups,
        arguments,
        name=lambda group: f"the examples {group.names[0]} to {group.names[-1]}",
        remedy="give fewer tokens in a batch",
    )
    for group, shard in made:
        entry = from_json(ShardEntry, shard["entry"])
        write_packed(register.folder, entry, shard["data"])
        team.enter(group, entry)
        discard(register.folder / journal_name(group.index))  # that a build in one process has left
        team.advance(float(group.costs.sum()), f"example {group.examples.stop:,}")
