# ruff: noqa: RUF009  (`same` is `dataclasses.field` with what another dataclass declares)
"""Base of the methods that learn from an external memory: the PLM owner builds it, and keeps everything else."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from pema.memory.build import build_memory
from pema.memory.config import BuildConfig, Dtype, Targets, require_pairing
from pema.memory.reader import Memory
from pema.methods.contract import Job, Method, Needs
from pema.owner.contract import Contexts
from pema.schema import same

if TYPE_CHECKING:
    from pema.owner.local import LocalPLM
    from pema.tasks.example import Example
    from pema.tasks.registry import Task

MEMORY = "memory"


@dataclass(frozen=True)
class MemoryMethod(Method):
    """Method that learns from the pairs (f(c_i), y_i) only; it has the settings of its memory."""

    shared: ClassVar[bool] = True

    contexts: Contexts = same(BuildConfig, "contexts")
    targets: Targets = same(BuildConfig, "targets")
    dtype: Dtype = same(BuildConfig, "dtype")

    def __post_init__(self) -> None:
        super().__post_init__()
        require_pairing(self.contexts, self.targets)

    @property
    def needs(self) -> Needs:
        """Representations and the LM head; in `teacher` mode the party that runs the PLM sees the targets."""
        return Needs("none", targets_at_owner=self.contexts == "teacher", gradients=False)

    @property
    def prepared_by(self) -> Mapping[str, Any]:
        """Settings of the memory."""
        return {MEMORY: {name: getattr(self, name) for name in ("contexts", "targets", "dtype")}}

    def prepare(self, plm: LocalPLM, job: Job, output: Path) -> None:
        """Build the memory of the training examples."""
        build_memory(
            plm,
            list(job.train),
            job.task,
            output / MEMORY,
            contexts=self.contexts,
            targets=self.targets,
            dtype=self.dtype,
        )


@contextlib.contextmanager
def memory_of(plm: LocalPLM, task: Task, examples: Sequence[Example]) -> Iterator[Memory]:
    """Build a temporary memory of `teacher` contexts inside the block, for measurements and not for training."""
    with tempfile.TemporaryDirectory(prefix="pema-measured-") as folder:
        yield build_memory(plm, list(examples), task, Path(folder) / MEMORY, dtype="float32")
