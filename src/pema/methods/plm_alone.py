"""The unadapted PLM, prompted with the task's template: the baseline of all adaptations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from pema.evaluation.perplexity import perplexity
from pema.generation.classification import Classification, choose_labels
from pema.generation.decoding import GeneratedTexts, decode, plain
from pema.methods.contract import AdaptedModel, Job, Method, Needs, TrainingReport
from pema.methods.on_memory import head_on_device, memory_of
from pema.owner.local import LocalPLM
from pema.tasks.example import Example


@dataclass(frozen=True)
class PLMAlone(Method):
    """The PLM alone: P(y | c) = P_LM(y | c)."""

    name: ClassVar[str] = "plm"
    seeded: ClassVar[bool] = False

    @property
    def needs(self) -> Needs:
        """Nothing."""
        return Needs("none", targets_at_owner=False, gradients=False)

    def train(self, job: Job, prepared: Path, output: Path) -> TrainingReport:
        """Return an empty report; there is nothing to train."""
        return TrainingReport(0, 0.0)

    def open(self, plm: LocalPLM, job: Job, prepared: Path, trained: Path) -> AdaptedModel:
        """See `Method.open`."""
        return _Plain(plm, job)


class _Plain(AdaptedModel):
    def __init__(self, plm: LocalPLM, job: Job) -> None:
        self._plm, self._job = plm, job

    @property
    def disk_bytes(self) -> int:
        return 0

    def generate(self, sources: Sequence[str | Example], **settings: Any) -> GeneratedTexts:  # noqa: ANN401
        settings = {**self._job.decoding, **settings}
        return decode(self._plm, self._plm.generator, sources, self._job.task, plain, **settings)

    def classify(
        self,
        sources: Sequence[str | Example],
        labels: Sequence[str],
        **settings: Any,  # noqa: ANN401
    ) -> Classification:
        return choose_labels(self._plm, self._plm.generator, sources, labels, self._job.task, **settings)

    def perplexity(self, examples: Sequence[Example]) -> float:
        memory = memory_of(self._plm, self._job.task, examples)
        return perplexity(memory.view(), head_on_device(self._plm, memory))
