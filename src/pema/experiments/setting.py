"""A setting: everything that decides one experiment's outcome, as one frozen value."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from pema.errors import ConfigError
from pema.memory.manifest import Dtype

Schedule = Literal["unrolling", "constant", "linear", "fitted"]


@dataclass(frozen=True)
class Setting:
    """One way of generating.

    Attributes:
        preset: preset of the adapter's training; None is the PLM alone.
        contexts: `teacher` or `predicted`.
        targets: pairing in `predicted` mode.
        changes: fields of the preset that differ.
        schedule: the mixture weight's course.
        lambda_max: weight at the first token, for every schedule but `fitted`.
        dtype: storage of the memory.
        seed: seed of the adapter's training.
    """

    preset: str | None = None
    contexts: Literal["teacher", "predicted"] = "teacher"
    targets: Literal["position", "aligned"] = "position"
    changes: Mapping[str, Any] = field(default_factory=dict)
    schedule: Schedule = "fitted"
    lambda_max: float = 0.9
    dtype: Dtype = "float16"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.contexts == "teacher" and self.targets == "aligned":
            raise ConfigError(
                "targets='aligned' is for contexts='predicted': teacher contexts agree with their targets."
            )

    @property
    def memory_key(self) -> str:
        """Names the memory that this setting needs."""
        return "-".join((self.contexts, self.targets, self.dtype))

    @property
    def adapter_key(self) -> str:
        """Names the adapter that this setting needs."""
        changes = "-".join(f"{name}={value}" for name, value in sorted(self.changes.items()))
        return "-".join(filter(None, (self.memory_key, self.preset, changes, f"seed{self.seed}")))

    @property
    def key(self) -> str:
        """Names the result."""
        if self.preset is None:
            return "plm"
        weight = "" if self.schedule == "fitted" else f"{self.lambda_max:g}"
        return f"{self.adapter_key}-{self.schedule}{weight}"

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values."""
        return asdict(self) | {"changes": dict(self.changes)}
