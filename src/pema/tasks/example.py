"""The texts that a task consists of: a source, its target, and the turns of a conversation before them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import count
from typing import Any, Literal

from pema.errors import DataError
from pema.schema import require, require_texts

Role = Literal["system", "user", "assistant"]


@dataclass(frozen=True)
class Turn:
    """A turn of a conversation.

    Attributes:
        role: who speaks: `system`, `user` or `assistant`.
        content: the text of the turn.

    Raises:
        ConfigError: the role is unknown.
    """

    role: Role
    content: str

    def __post_init__(self) -> None:
        require("role", self.role, Role)


@dataclass(frozen=True)
class Example:
    """A source X and its target Y.

    Attributes:
        source: the text that replaces `{source}` in the template; in a conversation, the last turn of the user.
        target: the text that the PLM should generate; in a conversation, the assistant's reply.
        where: "file:line" of the example, for error messages; "" if it does not come from a file.
        history: the turns of the conversation before `source`, the system's turn first; () if there are none.
        alternatives: further valid targets of the same source: each is one more pair in training, and one more
            reference of every metric.
    """

    source: str
    target: str
    where: str = ""
    history: tuple[Turn, ...] = ()
    alternatives: tuple[str, ...] = ()

    @property
    def references(self) -> tuple[str, ...]:
        """All valid targets, `target` first."""
        return (self.target, *self.alternatives)

    def to_list(self) -> list[Any]:
        """Return JSON-ready values: source and target, then alternatives and history if there are any; not `where`."""
        values: list[Any] = [self.source, self.target]
        if self.history or self.alternatives:
            values += [list(self.alternatives), [[turn.role, turn.content] for turn in self.history]]
        return values

    def to_row(self, *, several: bool = False) -> dict[str, Any]:
        """Return a row that `read_examples` reads; with `several`, its targets are a list."""
        row = {"source": self.source} | ({"targets": list(self.references)} if several else {"target": self.target})
        return row | ({"history": [asdict(turn) for turn in self.history]} if self.history else {})

    @classmethod
    def of_list(cls, values: Sequence[Any]) -> Example:
        """Build the example from the values of `to_list`."""
        source, target, alternatives, history = values if len(values) > 2 else (*values, (), ())
        turns = tuple(Turn(role, content) for role, content in history)
        return cls(source, target, history=turns, alternatives=tuple(alternatives))


def require_examples(examples: Iterable[Example]) -> list[Example]:
    """Return examples as a list.

    Raises:
        DataError: one is not an `Example`.
    """
    return list(map(_required, count(1), examples))


def require_sources(sources: Iterable[str | Example]) -> list[str | Example]:
    """Return the sources that texts are generated for as a list.

    Raises:
        ConfigError: it is one text, whose characters would each be a source.
        DataError: a source is neither a text nor an `Example`.
    """
    require_texts("sources", sources)
    given = list(sources)
    for number, source in enumerate(given, start=1):
        if not isinstance(source, str | Example):
            raise DataError(
                f"source {number} is of type {type(source).__name__}: give a text, or an Example of "
                "pema.read_examples(data)."
            )
    return given


def _required(number: int, example: object) -> Example:
    if not isinstance(example, Example):
        raise DataError(
            f"example {number} is of type {type(example).__name__}, not an Example: read the data with "
            "pema.read_examples(data)."
        )
    return example


def one_target_each(examples: Iterable[Example]) -> Iterator[Example]:
    """Yield an example for each valid target of each example, in order: what training consists of.

    Raises:
        DataError: one is not an `Example`.
    """
    for example in map(_required, count(1), examples):
        if not example.alternatives:
            yield example
            continue
        for target in example.references:
            yield replace(example, target=target, alternatives=())
