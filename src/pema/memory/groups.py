"""Groups: the units of work of a build. The pairs of a group's examples become one shard."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

from pema.memory.encoding import Tokens
from pema.memory.planning import Plan
from pema.memory.shard import Integers
from pema.tasks.example import Example


@dataclass(frozen=True)
class Group:
    """Consecutive examples, and all that is needed to ask a PLM for them: it may be sent to another machine.

    Attributes:
        index: number of the shard.
        examples: numbers of the examples in the build's input.
        tokens: their tokens.
        contexts: number of contexts requested for each example; in `predicted` mode the steps.
        costs: number of tokens requested for each example, steps included.
        names: what messages call the examples.
    """

    index: int
    examples: range
    tokens: Tokens
    contexts: Integers
    costs: Integers
    names: tuple[str, ...]

    @classmethod
    def of(cls, index: int, group: range, tokens: Tokens, plan: Plan, examples: Sequence[Example]) -> Self:
        """Cut a group out of a build's input; the tokens are not copied.

        Args:
            index: number of the shard.
            group: numbers of its examples.
            tokens: the tokens of all examples.
            plan: the requests of the build.
            examples: all examples.
        """
        here = slice(group.start, group.stop)
        names = tuple(examples[i].where or f"example {i + 1}" for i in group)
        return cls(index, group, tokens.part(group), plan.contexts[here], plan.tokens[here], names)

    def __len__(self) -> int:
        return len(self.examples)
