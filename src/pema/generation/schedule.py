"""Schedules: the weight lambda_t of the adapter as a pure function of the step t and the input's length SL."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor

from pema.errors import ConfigError
from pema.files import read_json, write_json
from pema.schema import check, from_json, option, require, short

LAMBDA_MAX = 0.9
"""The first weight of a schedule that sinks, the paper's."""

STEADY = 0.7
"""The weight of a schedule that stays: what dev data favour (docs/results.md)."""

SCHEDULE_FILE = "schedule.json"


@runtime_checkable
class Schedule(Protocol):
    """What the plug-in asks of a schedule; a class of your own needs only `weights`."""

    def weights(self, step: Tensor, input_length: Tensor) -> Tensor:
        """The adapter's weight lambda_t in [0, 1].

        Args:
            step: integers, t = 0 for the first generated token.
            input_length: integers of a shape that broadcasts with `step`; SL, tokens of the input (never the
                reference), at least 1.

        Returns:
            float32, of the broadcast shape.
        """


@dataclass(frozen=True)
class _Named:
    """The part that the schedules below share: their JSON form."""

    name: ClassVar[str]
    needs_length: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check(self)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values; the inverse of `schedule_from_dict`."""
        return {"schedule": self.name} | {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}


@dataclass(frozen=True)
class GradualUnrolling(_Named):
    """Gradual Unrolling (section 3.3): lambda_t = max(0, lambda_max - t * step)^2 with step = lambda_max / SL."""

    name: ClassVar[str] = "unrolling"
    lambda_max: float = option(LAMBDA_MAX, least=0.0, most=1.0)

    def weights(self, step: Tensor, input_length: Tensor) -> Tensor:
        """See `Schedule.weights`; 0 from t = SL on."""
        return (self.lambda_max * _left(step, input_length)).square().float()


@dataclass(frozen=True)
class Linear(_Named):
    """Gradual Unrolling without the square: lambda_t = max(0, lambda_max - t * step) with step = lambda_max / SL."""

    name: ClassVar[str] = "linear"
    lambda_max: float = option(LAMBDA_MAX, least=0.0, most=1.0)

    def weights(self, step: Tensor, input_length: Tensor) -> Tensor:
        """See `Schedule.weights`; 0 from t = SL on."""
        return (self.lambda_max * _left(step, input_length)).float()


@dataclass(frozen=True)
class Constant(_Named):
    """lambda_t = value at every step."""

    name: ClassVar[str] = "constant"
    needs_length: ClassVar[bool] = False
    value: float = option(STEADY, least=0.0, most=1.0)

    def weights(self, step: Tensor, input_length: Tensor) -> Tensor:
        """See `Schedule.weights`."""
        return _constant(self.value, step, input_length)


@dataclass(frozen=True)
class NoAdapter(_Named):
    """lambda_t = 0: the PLM alone."""

    name: ClassVar[str] = "none"
    needs_length: ClassVar[bool] = False

    def weights(self, step: Tensor, input_length: Tensor) -> Tensor:
        """See `Schedule.weights`."""
        return _constant(0.0, step, input_length)


@dataclass(frozen=True)
class Fitted(_Named):
    """lambda_t = values[bin of t / SL], learnt from held-out pairs by `fit_schedule`.

    Attributes:
        values: one weight per bin.
        span: the bins divide [0, span) of t / SL equally; the last one is open to the right.
    """

    name: ClassVar[str] = "fitted"
    values: tuple[float, ...] = option(least=0.0, most=1.0, longest=10_000)
    span: float = option(2.0, above=0.0, most=1e6)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.values:
            raise ConfigError("A fitted schedule needs at least one weight: values is empty.")

    def weights(self, step: Tensor, input_length: Tensor) -> Tensor:
        """See `Schedule.weights`."""
        values = torch.tensor(self.values, dtype=torch.float32, device=step.device)
        return values[relative_bin(step, input_length, len(self.values), self.span)]


def relative_bin(step: Tensor, input_length: Tensor, bins: int, span: float) -> Tensor:
    """The bin of t / SL among `bins` equal ones of [0, span), the last one open; int64, of the broadcast shape."""
    position = step.double() * bins / (span * input_length.double())
    return position.floor().long().clamp_(0, bins - 1)


SCHEDULES: dict[str, type[_Named]] = {
    kind.name: kind for kind in (GradualUnrolling, Constant, Linear, Fitted, NoAdapter)
}


WEIGHTED: dict[str, type[GradualUnrolling | Constant | Linear]] = {
    kind.name: kind for kind in (GradualUnrolling, Constant, Linear)
}
"""Those that one weight decides."""


def get_schedule(
    name: str, *, lambda_max: float | None = None, fitted: Fitted | None = None, adapter: Path | None = None
) -> Schedule:
    """The schedule that a user names.

    Args:
        name: unrolling, constant, linear, fitted or none.
        lambda_max: the weight at t = 0 before the square (unrolling), at t = 0 (linear) or at all t (constant); 0.9
            where it is not given, of `constant` 0.7.
        fitted: the fitted schedule itself.
        adapter: the adapter's folder, which holds the fitted schedule as `schedule.json`.

    Raises:
        ConfigError: an unknown name, a lambda_max outside [0, 1] or with a schedule that has none, or no fitted
            schedule where one is asked for.
    """
    require("lambda_max", lambda_max, float | None, least=0.0, most=1.0)
    if name not in SCHEDULES:
        raise ConfigError(f"There is no schedule {name!r}: choose one of {', '.join(SCHEDULES)}.")
    if name in ("fitted", "none") and lambda_max is not None:
        raise ConfigError(f"The schedule {name!r} has no lambda_max: leave it out, or choose unrolling.")
    if name == "none":
        return NoAdapter()
    if kind := WEIGHTED.get(name):
        return kind() if lambda_max is None else kind(lambda_max)
    if fitted is not None:
        return fitted
    if adapter is None or not (adapter / SCHEDULE_FILE).is_file():
        where = "was given" if adapter is None else f"is stored in {adapter}"
        raise ConfigError(f"No fitted schedule {where}: train the adapter again, or choose unrolling or constant.")
    return load_schedule(adapter)


def choose_schedule(
    folder: Path, name: str | None = None, lambda_max: float | None = None, *, contexts: str | None = "teacher"
) -> Schedule:
    """The schedule for the adapter in `folder`: the one that is named, or what suits the contexts it learned from.

    That is a constant weight for `teacher` contexts. An adapter from `predicted` contexts learned the reference's words
    where the PLM had left the reference, and ruins a sentence unless its weight sinks: there it is Gradual Unrolling.

    Raises:
        ConfigError: as `get_schedule`.
    """
    if name is None:
        name = "unrolling" if contexts == "predicted" else "constant"
    return get_schedule(name, lambda_max=lambda_max, adapter=folder)


def save_schedule(schedule: GradualUnrolling | Constant | Linear | Fitted | NoAdapter, folder: Path) -> None:
    """Write `schedule.json` into an adapter's folder."""
    write_json(folder / SCHEDULE_FILE, schedule.to_dict())


def load_schedule(folder: Path) -> Schedule:
    """Read `schedule.json` from an adapter's folder.

    Raises:
        DataError: the file is missing or is not JSON.
        ConfigError: it holds no schedule.
    """
    return schedule_from_dict(read_json(folder / SCHEDULE_FILE))


def schedule_from_dict(values: Mapping[str, Any]) -> Schedule:
    """The inverse of a schedule's `to_dict`.

    Raises:
        ConfigError: an unknown schedule, a key that it does not have, or a value out of range.
    """
    settings = dict(values)
    name = settings.pop("schedule", None)
    if not isinstance(name, str) or name not in SCHEDULES:
        raise ConfigError(f"There is no schedule {short(name)}: choose one of {', '.join(SCHEDULES)}.")
    schedule: Any = from_json(SCHEDULES[name], settings)
    return schedule  # type: ignore[no-any-return]


def _left(step: Tensor, input_length: Tensor) -> Tensor:
    """The share of the input that is left at t: max(0, 1 - t / SL), in float64 so that it is 0 at t = SL exactly."""
    return (1 - step.double() / input_length.double()).clamp_(min=0)


def _constant(value: float, step: Tensor, input_length: Tensor) -> Tensor:
    return torch.full_like(step * input_length, value, dtype=torch.float32)
