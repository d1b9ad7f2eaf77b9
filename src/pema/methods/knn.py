"""kNN-LM (Khandelwal et al. 2020, arXiv 1911.00172) on the external memory that PEMA learns from."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch

from pema.adapter.likelihood import log_p
from pema.errors import ConfigError
from pema.evaluation.perplexity import LOGITS_BYTES
from pema.files import size
from pema.generation.classification import Classification, choose_labels
from pema.generation.decoding import GeneratedTexts, decode, plain
from pema.memory.reader import Memory
from pema.methods.contract import AdaptedModel, Job, TrainingReport
from pema.methods.knn_index import Index, Neighbours, faiss_library
from pema.methods.knn_mixture import MixtureSettings, TokenMeasurements, choose, log_p_mixed, plugged
from pema.methods.on_memory import MEMORY, MemoryMethod, head_on_device, memory_of
from pema.owner.local import LocalPLM
from pema.schema import option
from pema.tasks.example import Example

INDEX = "index"
KS = tuple(2**power for power in range(11))
"""Numbers of neighbours that are compared on dev: up to the 1,024 of the paper."""


@dataclass(frozen=True)
class KNN(MemoryMethod):
    """P(y|c) = lambda P_kNN(y|c) + (1 - lambda) P_LM(y|c), with P_kNN over the k pairs whose f is nearest.

    Those of k, temperature and weight that are not given are chosen to maximise the likelihood of the dev targets. The
    dev contexts are `teacher` contexts, whatever the memory has, so the party that runs the PLM sees the dev targets
    unless all three are given.

    Attributes:
        index: FAISS factory string; `Flat` is exact search, `IVF4096,PQ64` approximate search for millions of pairs.
        k: number of neighbours.
        temperature: T in exp(-d / T), in units of squared L2 distance.
        weight: lambda, the weight of P_kNN.
    """

    name: ClassVar[str] = "knn-lm"
    seeded: ClassVar[bool] = False

    index: str = "Flat"
    k: int | None = option(None, least=1, most=1 << 24)
    temperature: float | None = option(None, above=0.0, most=1e18)
    weight: float | None = option(None, least=0.0, most=1.0)

    @property
    def trained_by(self) -> Mapping[str, Any]:
        """All settings except those chosen on dev: one index serves all values of k, temperature and weight."""
        return {n: value for n, value in self.settings().items() if n not in ("k", "temperature", "weight")}

    def train(self, job: Job, prepared: Path, output: Path) -> TrainingReport:
        """Index the memory; there is nothing to train."""
        memory = Memory.open(prepared / MEMORY)
        faiss_library()  # Import FAISS before the time is measured.
        started = time.perf_counter()
        Index.build(memory, self.index).save(output / INDEX)
        return TrainingReport(0, round(time.perf_counter() - started, 3))

    def open(self, plm: LocalPLM, job: Job, prepared: Path, trained: Path) -> AdaptedModel:
        """See `Method.open`; choose the settings that are not given.

        Raises:
            ConfigError: a setting must be chosen, and there are no dev examples.
            ExternalMemoryError, MismatchError: see `Index.load`.
        """
        index = Index.load(trained / INDEX, plm.description)
        return _Neighbouring(plm, job, index, self.choose(plm, job, index), trained / INDEX)

    def choose(self, plm: LocalPLM, job: Job, index: Index) -> MixtureSettings:
        """Return the given settings; choose the others to maximise the likelihood of `job.dev`."""
        if self.k is not None and self.temperature is not None and self.weight is not None:
            return MixtureSettings(self.k, self.temperature, self.weight)
        if not job.dev:
            raise ConfigError(
                "knn-lm chooses k, temperature and weight on dev examples, and there are none: give dev examples, or "
                "all three settings."
            )
        ks = [k for k in KS if k <= len(index)] if self.k is None else [self.k]
        return choose(measure(plm, job, job.dev, index, max(ks)), ks, self.temperature, self.weight)


class _Neighbouring(AdaptedModel):
    def __init__(self, plm: LocalPLM, job: Job, index: Index, chosen: MixtureSettings, folder: Path) -> None:
        self._plm, self._job, self._index, self._chosen, self._folder = plm, job, index, chosen, folder

    @property
    def disk_bytes(self) -> int:
        return size(self._folder)

    @property
    def chosen(self) -> Mapping[str, Any]:
        return self._chosen.to_dict()

    def generate(self, sources: Sequence[str | Example], **settings: Any) -> GeneratedTexts:  # noqa: ANN401
        plm, settings = self._plm, {**self._job.decoding, **settings}
        with plugged(plm.model, self._index, self._chosen):
            return decode(plm, plm.model, sources, self._job.task, plain, **settings)

    def classify(
        self,
        sources: Sequence[str | Example],
        labels: Sequence[str],
        **settings: Any,  # noqa: ANN401
    ) -> Classification:
        plm = self._plm
        with plugged(plm.model, self._index, self._chosen):
            return choose_labels(plm, plm.model, sources, labels, self._job.task, **settings)

    def perplexity(self, examples: Sequence[Example]) -> float:
        measured = measure(self._plm, self._job, examples, self._index, self._chosen.k)
        return float(torch.exp(-log_p_mixed(measured, self._chosen).double().mean()))


@torch.no_grad()
def measure(plm: LocalPLM, job: Job, examples: Sequence[Example], index: Index, k: int) -> TokenMeasurements:
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
