# ruff: noqa: RUF009  (`option` is `dataclasses.field` with the meaning and limits beside the default)
"""How texts are generated (`GenerateConfig`)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Self

from pema.adapter.schedule import ScheduleName
from pema.schema import SEED, check, documented, option

LARGEST = (1 << 31) - 1
"""Largest size of any number among the settings."""


@documented
@dataclass(frozen=True)
class GenerateConfig:
    """How texts are generated: step 4 of the method.

    Raises:
        ConfigError: a value outside its limits.
    """

    schedule: ScheduleName | None = option(
        None,
        "Mixture weight over the sequence; by default the adapter's own, which suits its contexts.",
    )
    lambda_max: float | None = option(
        None, "Weight at the first token; by default the schedule's own: 0.9, of constant 0.7.", least=0.0, most=1.0
    )
    batch_size: int = option(32, "Sequences at a time.", least=1, most=LARGEST)
    num_beams: int = option(1, "Beams; 1 is greedy decoding, or sampling.", least=1, most=1 << 20)
    max_new_tokens: int | None = option(
        None,
        "Longest output in tokens, within the PLM's context window; by default 2 SL + 16, SL the tokens of the input.",
        least=1,
        most=LARGEST,
    )
    do_sample: bool = option(False, "Draw from the whole mixture instead of taking its best token.")
    seed: int = option(0, "Seed of the draws.", least=0, most=SEED)

    def __post_init__(self) -> None:
        check(self)

    @classmethod
    def split(cls, settings: Mapping[str, Any]) -> tuple[Self, dict[str, Any]]:
        """Part settings into those declared here and further ones, which transformers knows.

        Raises:
            ConfigError: a value outside its limits.
        """
        own = {field.name for field in fields(cls)}
        further = {name: value for name, value in settings.items() if name not in own}
        return cls(**{name: value for name, value in settings.items() if name in own}), further
