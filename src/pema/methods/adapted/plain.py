"""The unadapted PLM."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pema.evaluation.perplexity import perplexity
from pema.generation.classification import Classification, choose_labels
from pema.generation.decoding import GeneratedTexts, generate_counted
from pema.methods.contract import AdaptedModel, Job
from pema.methods.on_memory import head_on_device, memory_of
from pema.owner.contract import PLM
from pema.tasks.example import Example


class Plain(AdaptedModel):
    """The PLM alone, prompted with the task's template."""

    def __init__(self, plm: PLM, job: Job) -> None:
        self._plm, self._job, self._task = plm, job, job.task

    @property
    def disk_bytes(self) -> int:
        """See `AdaptedModel.disk_bytes`."""
        return 0

    def generate(self, sources: Sequence[str | Example], **settings: Any) -> GeneratedTexts:  # noqa: ANN401
        """See `AdaptedModel.generate`."""
        return generate_counted(self._plm, None, sources, self._task, **{**self._job.decoding, **settings})

    def classify(
        self,
        sources: Sequence[str | Example],
        labels: Sequence[str],
        **settings: Any,  # noqa: ANN401
    ) -> Classification:
        """See `AdaptedModel.classify`."""
        return choose_labels(self._plm, self._plm.generator, sources, labels, self._task, **settings)

    def perplexity(self, examples: Sequence[Example]) -> float:
        """See `AdaptedModel.perplexity`."""
        memory = memory_of(self._plm, self._task, examples)
        return perplexity(memory.view(), head_on_device(self._plm, memory))
