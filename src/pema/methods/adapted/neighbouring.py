"""The PLM with the nearest neighbours in a memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from pema.adapter.likelihood import log_p
from pema.evaluation.perplexity import LOGITS_BYTES
from pema.files import size
from pema.generation.batches import plain
from pema.generation.classification import Classification, choose_labels
from pema.generation.decoding import GeneratedTexts, decode
from pema.methods.contract import AdaptedModel, Job
from pema.methods.knn_index import Index, Neighbours
from pema.methods.knn_mixture import MixtureSettings, TokenMeasurements, log_p_mixed, plugged
from pema.methods.on_memory import head_on_device, memory_of
from pema.owner.contract import PLM
from pema.tasks.example import Example


class Neighbouring(AdaptedModel):
    """The mixture of the neighbours' distribution and the PLM."""

    def __init__(self, plm: PLM, job: Job, index: Index, chosen: MixtureSettings, folder: Path) -> None:
        self._plm, self._job, self._index, self._chosen, self._folder = plm, job, index, chosen, folder

    @property
    def disk_bytes(self) -> int:
        """See `AdaptedModel.disk_bytes`."""
        return size(self._folder)

    @property
    def chosen(self) -> Mapping[str, Any]:
        """See `AdaptedModel.chosen`."""
        return self._chosen.to_dict()

    def generate(self, sources: Sequence[str | Example], **settings: Any) -> GeneratedTexts:  # noqa: ANN401
        """See `AdaptedModel.generate`."""
        plm, settings = self._plm, {**self._job.decoding, **settings}
        with plugged(plm.model, self._index, self._chosen):
            return decode(plm, plm.model, sources, self._job.task, plain, **settings)

    def classify(
        self,
        sources: Sequence[str | Example],
        labels: Sequence[str],
        **settings: Any,  # noqa: ANN401
    ) -> Classification:
        """See `AdaptedModel.classify`."""
        plm = self._plm
        with plugged(plm.model, self._index, self._chosen):
            return choose_labels(plm, plm.model, sources, labels, self._job.task, **settings)

    def perplexity(self, examples: Sequence[Example]) -> float:
        """See `AdaptedModel.perplexity`."""
        measured = measure(self._plm, self._job, examples, self._index, self._chosen.k)
        return float(torch.exp(-log_p_mixed(measured, self._chosen).double().mean()))


@torch.no_grad()
def measure(plm: PLM, job: Job, examples: Sequence[Example], index: Index, k: int) -> TokenMeasurements:
    """Measure the targets of examples after c = [I; X; y_<i]: log P_LM, and the k neighbours of their contexts."""
    plm_parts, distances, neighbour_targets, targets = [], [], [], []
    memory = memory_of(plm, job.task, examples)
    head = head_on_device(plm, memory)
    for batch in memory.view().batches(max(16, LOGITS_BYTES // (4 * head.vocabulary_size))):
        neighbours = index.search(batch.representations, k)
        plm_parts.append(log_p(head, batch.representations, batch.targets).cpu())
        distances.append(neighbours.distances)
        neighbour_targets.append(neighbours.targets)
        targets.append(batch.targets)
    neighbours = Neighbours(torch.cat(distances), torch.cat(neighbour_targets))
    return TokenMeasurements(torch.cat(plm_parts), neighbours, torch.cat(targets))
