"""Few-shot prompts: the unadapted PLM with solved training examples in front of the source.

This is the adaptation that a user of a closed PLM can do without any training, so comparisons show it.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from pema.errors import ConfigError, DataError
from pema.evaluation.perplexity import perplexity
from pema.generation.classification import Classification, choose_labels
from pema.generation.config import GenerateConfig
from pema.generation.decoding import GeneratedTexts, decode, plain
from pema.memory.encoding import Tokens
from pema.methods.contract import AdaptedModel, Job, Method, Needs, TrainingReport
from pema.methods.demonstrations import DemonstrationTemplate, eligible
from pema.methods.on_memory import head_on_device, memory_of
from pema.methods.retrieval import Index
from pema.owner.contract import BATCH_TOKENS
from pema.owner.local import LocalPLM
from pema.schema import option
from pema.tasks.example import Example
from pema.tasks.target_statistics import count_line_breaks, stop_after

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
    def trained_by(self) -> Mapping[str, Any]:
        """Nothing: the number of demonstrations only affects `open`."""
        return {}

    def train(self, job: Job, prepared: Path, output: Path) -> TrainingReport:
        """Return an empty report; there is nothing to train."""
        return TrainingReport(0, 0.0)

    def open(self, plm: LocalPLM, job: Job, prepared: Path, trained: Path) -> AdaptedModel:
        """See `Method.open`; choose k if it is not given.

        Raises:
            ConfigError: k must be chosen and there are no dev examples, or k is larger than the number of sources.
            DataError: no training example can be a demonstration.
        """
        examples = eligible(job.train, job.task.template, plm.tokenizer)
        if not examples:
            raise DataError(
                f"{self.name}: no training example can be a demonstration, because all have earlier turns, or contain "
                "'{source}' or control tokens of the PLM: change the examples, or leave the method out."
            )
        if self.k is not None and self.k > len(examples):
            raise ConfigError(
                f"{self.name}: k={self.k} demonstrations need as many different sources, and the training examples "
                f"have {len(examples)}: lower k."
            )
        reserved = int(Tokens.encode(plm, job.task.template, examples).target_lengths.max())

        def prompted(k: int) -> _Prompted:
            return _Prompted(plm, job, selection, k, reserved)

        selection = self.selection(job, examples)
        if self.k is not None:
            return prompted(self.k)
        if not job.dev:
            raise ConfigError(f"{self.name} chooses k on dev examples, and there are none: give dev examples, or k.")
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


class Selection(ABC):
    """Selection of demonstrations from examples."""

    def __init__(self, examples: Sequence[Example]) -> None:
        self.examples = examples

    @abstractmethod
    def select(self, source: str, k: int) -> Sequence[Example]:
        """Return k demonstrations for a source, in the order of the prompt."""

    @abstractmethod
    def stored(self, k: int) -> Sequence[Example]:
        """Return the examples that must be stored to select k for any source."""


class _First(Selection):
    def select(self, source: str, k: int) -> Sequence[Example]:
        return self.stored(k)

    def stored(self, k: int) -> Sequence[Example]:
        return self.examples[:k]


class _Nearest(Selection):
    def __init__(self, examples: Sequence[Example]) -> None:
        super().__init__(examples)
        self._index = Index([example.source for example in examples])

    def select(self, source: str, k: int) -> Sequence[Example]:
        return [self.examples[i] for i in reversed(self._index.nearest(source, k))]

    def stored(self, k: int) -> Sequence[Example]:
        return self.examples


class FewShot(FewShotMethod):
    """The same k training examples in front of every source, drawn with the seed; those of k + 1 include those of k."""

    name: ClassVar[str] = "few-shot"

    def selection(self, job: Job, examples: Sequence[Example]) -> Selection:
        """See `FewShotMethod.selection`."""
        return _First([examples[i] for i in np.random.default_rng(job.seed).permutation(len(examples))])


class RetrievedFewShot(FewShotMethod):
    """The k training examples with the most similar sources in front of each source, the most similar one last.

    Similarity is BM25 on character n-grams; see `pema.methods.retrieval`.
    """

    name: ClassVar[str] = "retrieved-few-shot"
    seeded: ClassVar[bool] = False

    def selection(self, job: Job, examples: Sequence[Example]) -> Selection:
        """See `FewShotMethod.selection`."""
        return _Nearest(examples)


class _Prompted(AdaptedModel):
    """The PLM with k demonstrations in its prompts."""

    def __init__(self, plm: LocalPLM, job: Job, selection: Selection, k: int, reserved: int) -> None:
        self._plm, self._k, self._selection = plm, k, selection
        template = job.task.template.settled(plm.tokenizer)
        self._template = DemonstrationTemplate(
            template.text,
            template.chat,
            template.system,
            demonstrations=lambda source: selection.select(source, k),
            window=plm.max_length,
            reserved=reserved,
        )
        self._job, self._task = job, replace(job.task, template=self._template)
        self._stop = () if template.chat else stop_after(count_line_breaks(each.target for each in job.train))

    @property
    def disk_bytes(self) -> int:
        """Bytes of the texts that demonstrations are selected from."""
        stored = self._selection.stored(self._k)
        return sum(len(text.encode()) for example in stored for text in (example.source, example.target))

    @property
    def chosen(self) -> Mapping[str, Any]:
        """The number of demonstrations, and of prompts into which not all fitted so far."""
        return {"k": self._k, "shortened_prompts": sum(map(bool, self._template.shortened.values()))}

    def generate(self, sources: Sequence[str | Example], **settings: Any) -> GeneratedTexts:  # noqa: ANN401
        plm, task = self._plm, self._task
        longest = max(len(each.prompt) for each in self._template.encode_prompts(plm.tokenizer, sources))
        settings = {**self._job.decoding, **settings}
        settings["stop"] = settings.get("stop") or self._stop  # a plain text would go on with a further example
        # The keys and values of long prompts take much memory.
        most = settings.get("batch_size", GenerateConfig.batch_size)
        settings["batch_size"] = min(most, max(1, BATCH_TOKENS // longest))
        return decode(plm, plm.generator, sources, task, plain, **settings)

    def classify(
        self,
        sources: Sequence[str | Example],
        labels: Sequence[str],
        **settings: Any,  # noqa: ANN401
    ) -> Classification:
        return choose_labels(self._plm, self._plm.generator, sources, labels, self._task, **settings)

    def perplexity(self, examples: Sequence[Example]) -> float:
        memory = memory_of(self._plm, self._task, examples)
        return perplexity(memory.view(), head_on_device(self._plm, memory))
