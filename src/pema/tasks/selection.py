"""Selection of demonstrations: the same ones for every source, or those with the most similar sources."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

from pema.tasks.example import Example
from pema.tasks.retrieval import Index


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


class First(Selection):
    """The first examples, for every source."""

    def select(self, source: str, k: int) -> Sequence[Example]:
        """See `Selection.select`."""
        return self.stored(k)

    def stored(self, k: int) -> Sequence[Example]:
        """See `Selection.stored`."""
        return self.examples[:k]


class Nearest(Selection):
    """The examples with the most similar sources, the most similar one last."""

    def __init__(self, examples: Sequence[Example]) -> None:
        """Index the sources of the examples."""
        super().__init__(examples)
        self._index = Index([example.source for example in examples])

    def select(self, source: str, k: int) -> Sequence[Example]:
        """See `Selection.select`."""
        return [self.examples[i] for i in reversed(self._index.nearest(source, k))]

    def stored(self, k: int) -> Sequence[Example]:
        """See `Selection.stored`."""
        return self.examples
