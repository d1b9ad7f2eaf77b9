"""The PLM with an adapter of PEMA."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pema.adapter.module import Adapter
from pema.adapter.schedule import Schedule
from pema.evaluation.perplexity import perplexity
from pema.files import size
from pema.generation.classification import Classification, choose_labels
from pema.generation.decoding import GeneratedTexts, generate_counted
from pema.generation.plugin import attach_to
from pema.methods.contract import AdaptedModel, Job
from pema.methods.on_memory import head_on_device, memory_of
from pema.owner.contract import PLM
from pema.tasks.example import Example


class Mixed(AdaptedModel):
    """The mixture of an adapter and the PLM."""

    def __init__(self, plm: PLM, job: Job, adapter: Adapter, schedule: Schedule, folder: Path) -> None:
        self._plm, self._job, self._adapter, self._schedule = plm, job, adapter, schedule
        self._folder = folder

    @property
    def disk_bytes(self) -> int:
        """See `AdaptedModel.disk_bytes`."""
        return size(self._folder)

    def generate(self, sources: Sequence[str | Example], **settings: Any) -> GeneratedTexts:  # noqa: ANN401
        """See `AdaptedModel.generate`."""
        settings = {**self._job.decoding, **settings}
        return generate_counted(self._plm, self._adapter, sources, self._job.task, self._schedule, **settings)

    def classify(
        self,
        sources: Sequence[str | Example],
        labels: Sequence[str],
        **settings: Any,  # noqa: ANN401
    ) -> Classification:
        """See `AdaptedModel.classify`."""
        plm = self._plm
        with attach_to(plm, self._adapter, self._schedule) as attached:
            return choose_labels(plm, plm.generator, sources, labels, self._job.task, attached.inputs, **settings)

    def perplexity(self, examples: Sequence[Example]) -> float:
        """See `AdaptedModel.perplexity`."""
        memory = memory_of(self._plm, self._job.task, examples)
        head = head_on_device(self._plm, memory)
        return perplexity(memory.view(), head, self._adapter.to(head.weight.device), self._schedule)
