# ruff: noqa: RUF009  (`option` is `dataclasses.field` with the meaning and limits beside the default)
"""How an external memory is built (`BuildConfig`)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pema.errors import ConfigError
from pema.owner.contract import Contexts
from pema.schema import check, documented, option

Targets = Literal["position", "aligned"]
"""Which gold token is paired with a `predicted` context: the one at its position, or the one that follows the gold
prefix nearest to what the PLM has generated."""

Dtype = Literal["float32", "float16", "bfloat16", "int8"]
"""How representations are stored."""


def require_pairing(contexts: str, targets: str) -> None:
    """Refuse a pairing that means nothing for the contexts.

    Raises:
        ConfigError: it is `aligned` for `teacher` contexts.
    """
    if contexts == "teacher" and targets == "aligned":
        raise ConfigError("targets='aligned' is for contexts='predicted': teacher contexts agree with their targets.")


@documented
@dataclass(frozen=True)
class BuildConfig:
    """How an external memory is built: step 1 of the method.

    Raises:
        ConfigError: a value outside its limits, or `aligned` targets for `teacher` contexts.
    """

    contexts: Contexts = option(
        "teacher",
        "What follows the prompt in a context: the target's own prefix, or what the PLM generates, whose owner then "
        "sees no target.",
    )
    targets: Targets = option("position", "With predicted contexts, how they are paired with gold tokens.")
    dtype: Dtype = option("float16", "How representations are stored; int8 has a scale for each row.")
    limit: int | None = option(None, "Use only the first so many examples.", least=1)
    batch_tokens: int = option(8192, "Tokens that go through the PLM at once.", least=1)
    examples_per_shard: int = option(512, "Most examples in one file of the memory.", least=1, most=1 << 40)

    def __post_init__(self) -> None:
        check(self)
        require_pairing(self.contexts, self.targets)
