"""The settings for recovering an LM head (`RecoveryConfig`)."""

from __future__ import annotations

from dataclasses import dataclass

from pema.schema import SEED, check, documented, option


@documented
@dataclass(frozen=True)
class RecoveryConfig:
    """Settings for recovering an LM head from log-probabilities.

    Raises:
        ConfigError: a value is outside its limits.
    """

    queries: int | None = option(
        None,
        "Maximum number of requests for the log-probabilities of all tokens; without it none is sent, and the message "
        "says how many are needed.",
        least=1,
        most=1 << 20,
    )
    seed: int = option(0, "Seed of the random tokens in the contexts.", least=0, most=SEED)

    def __post_init__(self) -> None:
        check(self)
