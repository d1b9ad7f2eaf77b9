"""Schedules: the weight lambda_t of the adapter as a pure function of the step t and the input's length SL."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, runtime_checkable

from pema.errors import ConfigError
from pema.schema import among, check, from_json, option, require, short

if TYPE_CHECKING:
    from torch import Tensor

ScheduleName = Literal["unrolling", "constant", "linear", "fitted", "none"]
"""Names of schedules."""

LAMBDA_MAX = 0.9
"""Default initial weight of a decreasing schedule (the paper's)."""

STEADY = 0.7
"""Default weight of a constant schedule: the best on dev data (docs/results.md)."""


@runtime_checkable
class Schedule(Protocol):
    """Interface of a schedule; a class of your own needs only `weights`."""

    def weights(self, step: Tensor, input_length: Tensor) -> Tensor:
        """Return the adapter's weight lambda_t in [0, 1].

        Args:
            step: integers, t = 0 for the first generated token.
            input_length: SL, the number of tokens of the input (never of the reference), at least 1; integers of a
                shape that broadcasts with `step`.

        Returns:
            float32, of the broadcast shape.
        """


@dataclass(frozen=True)
class NamedSchedule(ABC):
    """Base class of the schedules below: a name and a JSON form, in which an adapter stores it."""

    name: ClassVar[str]
    needs_length: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check(self)

    @abstractmethod
    def weights(self, step: Tensor, input_length: Tensor) -> Tensor:
        """See `Schedule.weights`."""

    def __str__(self) -> str:
        values = [str(value) for value in asdict(self).values() if not isinstance(value, tuple)]
        return self.name if isinstance(self, Fitted) else " ".join([self.name, *values])

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values."""
        return {"schedule": self.name} | {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: object) -> NamedSchedule:
        """Build a schedule from the result of `to_dict`.

        Raises:
            ConfigError: the schedule or a key is unknown, a value is out of range, or it is a schedule of another
                class.
        """
        if not isinstance(values, Mapping):
            raise ConfigError(f"a schedule must be an object, not {short(values)}.")
        settings = dict(values)
        name = settings.pop("schedule", None)
        among("schedule", [name], SCHEDULES)
        kind = SCHEDULES[name]
        if not issubclass(kind, cls):
            raise ConfigError(f"expected a schedule {getattr(cls, 'name', '')!r}, got {name!r}.")
        return from_json(kind, settings)


@dataclass(frozen=True)
class GradualUnrolling(NamedSchedule):
    """Gradual Unrolling (section 3.3): lambda_t = max(0, lambda_max - t * step)^2 with step = lambda_max / SL."""

    name: ClassVar[str] = "unrolling"
    lambda_max: float = option(LAMBDA_MAX, "Weight at t = 0 (of unrolling: before the square).", least=0.0, most=1.0)

    def weights(self, step: Tensor, input_length: Tensor) -> Tensor:
        """Return the weights, 0 from t = SL on; see `Schedule.weights`."""
        return (self.lambda_max * _left(step, input_length)).square().float()


@dataclass(frozen=True)
class Linear(NamedSchedule):
    """Gradual Unrolling without the square: lambda_t = max(0, lambda_max - t * step) with step = lambda_max / SL."""

    name: ClassVar[str] = "linear"
    lambda_max: float = option(LAMBDA_MAX, "Weight at t = 0 (of unrolling: before the square).", least=0.0, most=1.0)

    def weights(self, step: Tensor, input_length: Tensor) -> Tensor:
        """Return the weights, 0 from t = SL on; see `Schedule.weights`."""
        return (self.lambda_max * _left(step, input_length)).float()


@dataclass(frozen=True)
class Constant(NamedSchedule):
    """Constant weight: lambda_t = value at every step."""

    name: ClassVar[str] = "constant"
    needs_length: ClassVar[bool] = False
    value: float = option(STEADY, "The weight.", least=0.0, most=1.0)

    def weights(self, step: Tensor, input_length: Tensor) -> Tensor:
        """See `Schedule.weights`."""
        return _constant(self.value, step, input_length)


@dataclass(frozen=True)
class NoAdapter(NamedSchedule):
    """No adapter: lambda_t = 0, the PLM alone."""

    name: ClassVar[str] = "none"
    needs_length: ClassVar[bool] = False

    def weights(self, step: Tensor, input_length: Tensor) -> Tensor:
        """See `Schedule.weights`."""
        return _constant(0.0, step, input_length)


@dataclass(frozen=True)
class Fitted(NamedSchedule):
    """Fitted weights: lambda_t = values[bin of t / SL], from held-out pairs by `fit_schedule`.

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
            raise ConfigError("a fitted schedule needs at least one weight: values is empty.")

    def weights(self, step: Tensor, input_length: Tensor) -> Tensor:
        """See `Schedule.weights`."""
        values = step.float().new_tensor(self.values)
        return values[relative_bin(step, input_length, len(self.values), self.span)]


def relative_bin(step: Tensor, input_length: Tensor, bins: int, span: float) -> Tensor:
    """Return the bin of t / SL among `bins` equal bins of [0, span), the last one open: int64, broadcast shape."""
    position = step.double() * bins / (span * input_length.double())
    return position.floor().long().clamp_(0, bins - 1)


SCHEDULES: dict[str, type[NamedSchedule]] = {
    kind.name: kind for kind in (GradualUnrolling, Constant, Linear, Fitted, NoAdapter)
}

WEIGHTED: dict[str, type[GradualUnrolling | Constant | Linear]] = {
    kind.name: kind for kind in (GradualUnrolling, Constant, Linear)
}
"""Schedules with the single parameter lambda_max."""


def get_schedule(
    name: str, *, lambda_max: float | None = None, fitted: Fitted | None = None, why_not: str = "was given"
) -> NamedSchedule:
    """Return the schedule of this name.

    Args:
        name: unrolling, constant, linear, fitted or none.
        lambda_max: the weight at t = 0 before the square (unrolling), at t = 0 (linear) or at all t (constant); 0.9
            where it is not given, of `constant` 0.7.
        fitted: the fitted schedule, if there is one.
        why_not: reason in the message if there is none.

    Raises:
        ConfigError: the name is unknown, lambda_max is outside [0, 1] or given for a schedule without it, or there is
            no fitted schedule.
    """
    require("lambda_max", lambda_max, float | None, least=0.0, most=1.0)
    among("schedule", [name], SCHEDULES)
    if name not in WEIGHTED and lambda_max is not None:
        raise ConfigError(f"the schedule {name!r} has no lambda_max: leave it out, or choose unrolling.")
    if name == NoAdapter.name:
        return NoAdapter()
    if kind := WEIGHTED.get(name):
        return kind() if lambda_max is None else kind(lambda_max)
    if fitted is None:
        raise ConfigError(f"no fitted schedule {why_not}: choose unrolling, constant or linear.")
    return fitted


def suited(contexts: str | None) -> NamedSchedule:
    """Return the schedule suited to the contexts that an adapter was trained on.

    It is a constant weight for `teacher` contexts and after on-policy rounds. An adapter from `predicted` contexts of
    the PLM has learned words of the reference in contexts that differ from the reference, and damages a sentence unless
    its weight decreases: it gets Gradual Unrolling.
    """
    return GradualUnrolling() if contexts == "predicted" else Constant()


def _left(step: Tensor, input_length: Tensor) -> Tensor:
    """Return the remaining share of the input, max(0, 1 - t / SL), in float64 so that it is exactly 0 at t = SL."""
    return (1 - step.double() / input_length.double()).clamp_(min=0)


def _constant(value: float, step: Tensor, input_length: Tensor) -> Tensor:
    return (step * input_length).float().fill_(value)
