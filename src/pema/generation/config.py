# ruff: noqa: RUF009  (`option` is `dataclasses.field` with the meaning and limits beside the default)
"""Settings of generation (`GenerateConfig`)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Self

from pema.adapter.config import AdapterConfig
from pema.adapter.schedule import ScheduleName
from pema.schema import NOT_EMPTY, SEED, check, documented, option

LARGEST = (1 << 31) - 1
"""Largest absolute value of a number among the settings."""


@documented
@dataclass(frozen=True)
class GenerateConfig:
    """Settings of generation, step 4 of the method.

    Raises:
        ConfigError: a value is outside its limits.
    """

    schedule: ScheduleName | None = option(
        None,
        "Mixture weight over the sequence; by default the adapter's own, which suits its contexts.",
    )
    lambda_max: float | None = option(
        None, "Weight at the first token; by default the schedule's own: 0.9, of constant 0.7.", least=0.0, most=1.0
    )
    batch_size: int = option(32, "Sequences per batch.", least=1, most=LARGEST)
    num_beams: int = option(1, "Number of beams; 1 means greedy decoding, or sampling.", least=1, most=1 << 20)
    max_new_tokens: int | None = option(
        None,
        "Maximum output length in tokens, within the PLM's context window; by default the adapter's own, which follows "
        "from its training targets. Without one: 2 SL + 16 (SL: input tokens).",
        least=1,
        most=LARGEST,
    )
    stop: tuple[str, ...] | None = option(
        None,
        "End a text before the first of these strings; by default the adapter's own: a line break, or a blank line, "
        "if no training target contains one.",
        pattern=NOT_EMPTY,
    )
    do_sample: bool = option(False, "Draw from the full mixture instead of taking its most probable token.")
    seed: int = option(0, "Random seed of sampling.", least=0, most=SEED)

    def __post_init__(self) -> None:
        check(self)

    @classmethod
    def split(cls, settings: Mapping[str, Any]) -> tuple[Self, dict[str, Any]]:
        """Split settings into those declared here and further settings of transformers.

        Raises:
            ConfigError: a value is outside its limits.
        """
        own = {field.name for field in fields(cls)}
        further = {name: value for name, value in settings.items() if name not in own}
        return cls(**{name: value for name, value in settings.items() if name in own}), further


def with_own_ending(config: AdapterConfig | None, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings, with the adapter's own token limit and stop strings for those that are not given."""
    if config is None:
        return dict(settings)
    own = {"max_new_tokens": config.max_new_tokens, "stop": config.stop}
    return own | {name: value for name, value in settings.items() if value is not None or name not in own}
