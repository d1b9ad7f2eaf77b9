# ruff: noqa: RUF009  (`same` is `dataclasses.field` with what another dataclass declares)
"""Base of the methods that learn from an external memory: the PLM owner builds it, and keeps everything else."""

from __future__ import annotations

import tempfile
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from pema.memory.config import BuildConfig, Dtype, Targets, require_pairing
from pema.methods.contract import Job, Method, Needs, Requirement
from pema.owner.contract import PLM, Contexts
from pema.schema import same
from pema.tasks.example import Example
from pema.tasks.template import Template

if TYPE_CHECKING:
    from pema.memory.reader import Memory
    from pema.owner.head import Head
    from pema.tasks.registry import Task

MEMORY = "memory"


@dataclass(frozen=True)
class MemoryMethod(Method):
    """Method that learns from the pairs (f(c_i), y_i) only; it has the settings of its memory."""

    contexts: Contexts = same(BuildConfig, "contexts")
    targets: Targets = same(BuildConfig, "targets")
    dtype: Dtype = same(BuildConfig, "dtype")

    def __post_init__(self) -> None:
        super().__post_init__()
        require_pairing(self.contexts, self.targets)

    @property
    def shared(self) -> bool:
        """True: the memory depends on the PLM and the data only."""
        return True

    def building(self, **changes: Any) -> BuildConfig:  # noqa: ANN401
        """Return the settings of the memory, with changes."""
        return BuildConfig(contexts=self.contexts, targets=self.targets, dtype=self.dtype, **changes)

    @property
    def needs(self) -> Needs:
        """Representations and the LM head; in `teacher` mode the party that runs the PLM sees the targets."""
        return Needs("none", targets_at_owner=self.contexts == "teacher", gradients=False)

    @property
    def requires(self) -> frozenset[Requirement]:
        """The contexts of the memory."""
        return frozenset({self.contexts})

    @property
    def prepared_by(self) -> Mapping[str, Any]:
        """Settings of the memory."""
        return {MEMORY: {name: getattr(self, name) for name in ("contexts", "targets", "dtype")}}

    def prepare(self, plm: PLM, job: Job, output: Path) -> None:
        """Build the memory of the training examples."""
        from pema.memory.build import build_memory

        building = self.building(batch_tokens=job.batch_tokens)
        build_memory(plm, list(job.train), job.task, output / MEMORY, building)


def memory_of(plm: PLM, task: Task, examples: Sequence[Example]) -> Memory:
    """Return a temporary memory of `teacher` contexts, for measurements and not for training.

    The memory of the last examples is kept as long as the PLM, so all candidates and methods that are measured on the
    same dev examples with the same template object share one pass of the PLM.
    """
    from pema.memory.build import build_memory

    kept = _measured.get(plm)
    # Templates are compared by identity: those with demonstrations can be equal and write other prompts.
    if kept is None or kept.template is not task.template or kept.examples != tuple(examples):
        folder = tempfile.TemporaryDirectory(prefix="pema-measured-")  # removed when nothing refers to it
        memory = build_memory(plm, list(examples), task, Path(folder.name) / MEMORY, dtype="float32")
        kept = _measured[plm] = _Measured(task.template, tuple(examples), folder, memory)
    return kept.memory


def head_on_device(plm: PLM, memory: Memory) -> Head:
    """Return the head on the PLM's device; the memory's own if the PLM has it on none (offloaded weights)."""
    head = plm.head()
    return memory.head() if head.weight.device.type == "meta" else head


class _Measured(NamedTuple):
    template: Template
    examples: tuple[Example, ...]
    folder: tempfile.TemporaryDirectory[str]
    memory: Memory


_measured: weakref.WeakKeyDictionary[PLM, _Measured] = weakref.WeakKeyDictionary()
