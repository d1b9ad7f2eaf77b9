"""kNN-LM (Khandelwal et al. 2020, arXiv 1911.00172) on the external memory that PEMA learns from."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from pema.errors import ConfigError
from pema.extras import require_library
from pema.methods.contract import AdaptedModel, Job, Requirement, TrainingReport
from pema.methods.on_memory import MEMORY, MemoryMethod
from pema.schema import option

if TYPE_CHECKING:
    from pema.methods.knn_index import Index
    from pema.methods.knn_mixture import MixtureSettings
    from pema.owner.contract import PLM
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

    def require_libraries(self) -> None:
        """See `Method.require_libraries`."""
        require_library(self.name, "faiss", "knn")

    @property
    def requires(self) -> frozenset[Requirement]:
        """All probabilities, the contexts of the memory, and the likelihoods of dev targets if there is a choice."""
        required: set[Requirement] = {"probabilities"}
        if None in (self.k, self.temperature, self.weight):
            required.add("likelihoods")
        return super().requires | required

    @property
    def trained_by(self) -> Mapping[str, Any]:
        """All settings except those chosen on dev: one index serves all values of k, temperature and weight."""
        return {n: value for n, value in self.settings().items() if n not in ("k", "temperature", "weight")}

    def require_examples(self, train: Sequence[Example], dev: Sequence[Example]) -> None:
        """See `Method.require_examples`."""
        if None in (self.k, self.temperature, self.weight) and not dev:
            raise ConfigError(
                "knn-lm chooses k, temperature and weight on dev examples, and there are none: give dev examples, or "
                "all three settings."
            )

    def train(self, job: Job, prepared: Path, output: Path) -> TrainingReport:
        """Index the memory; there is nothing to train."""
        from pema.memory.reader import Memory
        from pema.methods.knn_index import Index, faiss_library

        memory = Memory.open(prepared / MEMORY)
        faiss_library()  # Import FAISS before the time is measured.
        started = time.perf_counter()
        Index.build(memory, self.index).save(output / INDEX)
        return TrainingReport(0, round(time.perf_counter() - started, 3))

    def open(self, plm: PLM, job: Job, prepared: Path, trained: Path) -> AdaptedModel:
        """See `Method.open`; choose the settings that are not given.

        Raises:
            ConfigError: a setting must be chosen, and there are no dev examples.
            ExternalMemoryError, MismatchError: see `Index.load`.
        """
        from pema.methods.adapted.neighbouring import Neighbouring
        from pema.methods.knn_index import Index

        index = Index.load(trained / INDEX, plm.description)
        return Neighbouring(plm, job, index, self.choose(plm, job, index), trained / INDEX)

    def choose(self, plm: PLM, job: Job, index: Index) -> MixtureSettings:
        """Return the given settings; choose the others to maximise the likelihood of `job.dev`.

        Raises:
            ConfigError: a setting must be chosen, and there are no dev examples.
        """
        from pema.methods.adapted.neighbouring import measure
        from pema.methods.knn_mixture import MixtureSettings, choose

        if self.k is not None and self.temperature is not None and self.weight is not None:
            return MixtureSettings(self.k, self.temperature, self.weight)
        self.require_examples(job.train, job.dev)
        ks = [k for k in KS if k <= len(index)] if self.k is None else [self.k]
        return choose(measure(plm, job, job.dev, index, max(ks)), ks, self.temperature, self.weight)
