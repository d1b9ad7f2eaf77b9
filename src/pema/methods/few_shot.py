"""Few-shot prompts: the unadapted PLM with solved training examples in front of the source.

This is the adaptation that a user of a closed PLM can do without any training, so comparisons show it.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from pema.errors import ConfigError, DataError
from pema.methods.contract import AdaptedModel, Job, Method, Needs, Requirement, TrainingReport
from pema.schema import option
from pema.tasks.demonstrations import eligible, one_of_each_source
from pema.tasks.example import Example
from pema.tasks.selection import First, Nearest, Selection

if TYPE_CHECKING:
    from pema.owner.contract import PLM

KS = (1, 2, 4, 8, 16)
"""Numbers of demonstrations that are compared on dev."""

DEV = 50
"""Number of dev examples that the number of demonstrations is chosen on, evenly spaced over all of them."""


@dataclass(frozen=True)
class FewShotMethod(Method):
    """Method that puts k training examples in front of each source, and trains nothing.

    If k is not given, it is chosen on dev by the likelihood of the targets: it is doubled from 1 as long as the
    likelihood rises. A text ends at the token that ends answers; after a plain prompt also at a line break if no
    training target contains one, or else at a blank line if none contains that.

    Attributes:
        k: number of demonstrations. They have different sources.
    """

    k: int | None = option(None, least=1, most=10_000)

    @property
    def needs(self) -> Needs:
        """No weights; the party that runs the PLM sees the demonstrations, and the dev targets if it chooses k."""
        return Needs("none", targets_at_owner=True, gradients=False)

    @property
    def requires(self) -> frozenset[Requirement]:
        """Greedy texts, and the likelihoods of dev targets if k is not given."""
        return frozenset({"likelihoods"} if self.k is None else ())

    @property
    def trained_by(self) -> Mapping[str, Any]:
        """Nothing: the number of demonstrations only affects `open`."""
        return {}

    def require_examples(self, train: Sequence[Example], dev: Sequence[Example]) -> None:
        """See `Method.require_examples`; which examples are text is known with the tokenizer only."""
        self._require(len(one_of_each_source(each for each in train if not each.history)), dev)

    def _require(self, sources: int, dev: Sequence[Example]) -> None:
        """Refuse a k that this number of demonstrations does not suffice for, or that nothing can choose."""
        if not sources:
            raise DataError(
                f"{self.name}: no training example can be a demonstration, because all have earlier turns, or contain "
                "'{source}' or control tokens of the PLM: change the examples, or leave the method out."
            )
        if self.k is not None and self.k > sources:
            raise ConfigError(
                f"{self.name}: k={self.k} demonstrations need as many different sources, and the training examples "
                f"have {sources}: lower k."
            )
        if self.k is None and not dev:
            raise ConfigError(f"{self.name} chooses k on dev examples, and there are none: give dev examples, or k.")

    def train(self, job: Job, prepared: Path, output: Path) -> TrainingReport:
        """Return an empty report; there is nothing to train."""
        return TrainingReport(0, 0.0)

    def open(self, plm: PLM, job: Job, prepared: Path, trained: Path) -> AdaptedModel:
        """See `Method.open`; choose k if it is not given.

        Raises:
            ConfigError: k must be chosen and there are no dev examples, or k is larger than the number of sources.
            DataError: no training example can be a demonstration.
        """
        from pema.memory.encoding import Tokens
        from pema.methods.adapted.prompted import Prompted

        examples = eligible(job.train, job.task.template, plm.tokenizer)
        self._require(len(examples), job.dev)
        reserved = int(Tokens.encode(plm, job.task.template, examples).target_lengths.max())

        def prompted(k: int) -> Prompted:
            return Prompted(plm, job, selection, k, reserved)

        selection = self.selection(job, examples)
        if self.k is not None:
            return prompted(self.k)
        dev = job.dev[:: -(-len(job.dev) // DEV)]
        best, lowest = prompted(1), math.inf
        for k in KS:
            if k > len(examples):
                break
            candidate = prompted(k)
            value = candidate.perplexity(dev)
            if value >= lowest:
                break
            best, lowest = candidate, value
        return best

    @abstractmethod
    def selection(self, job: Job, examples: Sequence[Example]) -> Selection:
        """Return the selection of demonstrations from examples with different sources."""


class FewShot(FewShotMethod):
    """The same k training examples in front of every source, drawn with the seed; those of k + 1 include those of k."""

    name: ClassVar[str] = "few-shot"

    def selection(self, job: Job, examples: Sequence[Example]) -> Selection:
        """See `FewShotMethod.selection`."""
        return First([examples[i] for i in np.random.default_rng(job.seed).permutation(len(examples))])


class RetrievedFewShot(FewShotMethod):
    """The k training examples with the most similar sources in front of each source, the most similar one last.

    Similarity is BM25 on character n-grams; see `pema.tasks.retrieval`.
    """

    name: ClassVar[str] = "retrieved-few-shot"
    seeded: ClassVar[bool] = False

    def selection(self, job: Job, examples: Sequence[Example]) -> Selection:
        """See `FewShotMethod.selection`."""
        return Nearest(examples)
