"""The work on groups in one process: one group is requested from the PLM while the previous one is being written."""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from pema import console
from pema.errors import PemaError, ProcessError
from pema.memory.encoder import Encoder
from pema.memory.engines.launched import Team
from pema.memory.groups import Group
from pema.memory.journal import Journal
from pema.memory.shard import write_shard
from pema.owner.contract import ContextRepresentations


@dataclass(frozen=True)
class Work:
    """A build in this process.

    Attributes:
        encoder: makes shards of groups.
        team: where they are entered, and who writes the others.
        total: number of examples of the input.
    """

    encoder: Encoder
    team: Team
    total: int

    def do(self, groups: Iterable[Group]) -> None:
        """Write the shards of the groups.

        Raises:
            PemaError: see `build_memory`; the answers for the group that failed are in its journal.
        """
        pending: Future[None] | None = None
        with ThreadPoolExecutor(1, "pema-memory-writer") as writer:
            for group in groups:
                journal = Journal(self.team.register.folder, group.index, group.examples, self.encoder.asked)
                answers: list[ContextRepresentations | None] = [journal.answers.get(i) for i in range(len(group))]
                if journal.answers:
                    answered = group.examples.start + len(journal.answers)
                    console.note(f"{answered:,} of {self.total:,} examples were answered before.")
                    self.team.advance(float(group.costs[list(journal.answers)].sum()), earlier=True)
                note = f"example {group.examples.stop:,} of {self.total:,}"
                for answer in self.encoder.answers(group, journal):
                    answers[answer.index] = answer
                    self.team.advance(float(group.costs[answer.index]), note)
                if pending is not None:
                    pending.result()
                pending = writer.submit(self._write, group, answers, journal)
            if pending is not None:
                pending.result()

    def _write(self, group: Group, answers: list[ContextRepresentations | None], journal: Journal) -> None:
        try:
            scales = None if group.index == 0 else self.team.scales()
        except ProcessError:
            journal.flush()
            raise
        try:
            contents = self.encoder.contents(group, answers, scales)
        except PemaError:  # the PLM may answer differently next time: in float32, or with another server
            journal.remove()
            raise
        entry = write_shard(self.team.register.folder, group.index, contents)
        self.team.enter(group, entry)
        journal.remove()
