# ruff: noqa: RUF009  (`option` is `dataclasses.field` with the meaning and limits beside the default)
"""The settings of where work is done (`EngineConfig`)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pema.errors import ConfigError
from pema.schema import check, documented, option

Engine = Literal["process", "ray"]
"""What does the work: this process (or those of a launcher), or workers on a Ray cluster."""


@documented
@dataclass(frozen=True)
class EngineConfig:
    """Where a memory is built, an adapter is trained, texts are generated or labels chosen.

    Raises:
        ConfigError: a value is outside its limits, or a setting of `ray` is given without it.
    """

    engine: Engine = option(
        "process", "What does the work: this process (or those of a launcher), or workers on a Ray cluster."
    )
    workers: int | None = option(
        None,
        "Number of workers on the Ray cluster; default: one for each GPU if GPUs are used, else one for each machine.",
        least=1,
        most=1 << 20,
    )
    address: str | None = option(
        None,
        "Address of the Ray cluster; default: that in RAY_ADDRESS, or else Ray is started on this machine.",
        line=True,
        longest=512,
    )

    def __post_init__(self) -> None:
        check(self)
        for name in ("workers", "address"):
            if self.engine != "ray" and getattr(self, name) is not None:
                raise ConfigError(f"{name}={getattr(self, name)} is a setting of engine='ray': give that, or omit it.")
