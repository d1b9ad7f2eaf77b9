"""What every method of adaptation is given, what it must do, and what it leaves behind.

A run has three stages, so that each one's cost can be told from the others':

- `prepare`, at the PLM owner's: what the owner hands out (a memory, an emulator). Methods that need the same share it.
- `train`, in a process of its own: what adapts the PLM to the task. Its peak memory is the method's training memory.
- `open`: the adapted PLM, which generates and says how likely targets are.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from pema.errors import ConfigError
from pema.schema import among, check, documented, option

if TYPE_CHECKING:
    from pema.generation.decoding import Generated
    from pema.owner.local import LocalPLM
    from pema.tasks.example import Example
    from pema.tasks.registry import Task


MOST = 1_000_000
"""Most epochs, trials or steps."""


@dataclass(frozen=True)
class Needs:
    """What a method asks of the PLM owner.

    Attributes:
        weights: what the data owner must be given of the PLM's weights, the LM head apart: nothing, some of them (or a
            compressed stand-in for the rest), or all.
        targets_at_owner: whether the PLM owner sees the training targets when it keeps its weights to itself.
        gradients: whether training takes gradients through the PLM's layers.
    """

    weights: Literal["none", "some", "all"]
    targets_at_owner: bool
    gradients: bool


@documented
@dataclass(frozen=True)
class Budget:
    """What training may use, the same for every method of a comparison."""

    called: ClassVar[str] = "[budget]"

    trials: int = option(
        4,
        "Most candidates that are trained and compared on dev; what needs no training of its own (a schedule) is free.",
        least=1,
        most=MOST,
    )
    epochs: int = option(30, "Most passes over the training examples.", least=1, most=MOST)
    patience: int = option(3, "Epochs without a lower held-out loss after which training stops.", least=1, most=MOST)
    dev_fraction: float = option(
        0.1,
        "Share of the training examples held out for early stopping and fitted schedules, drawn with the seed.",
        above=0.0,
        below=1.0,
    )

    def __post_init__(self) -> None:
        try:
            check(self)
        except ConfigError as error:
            raise ConfigError(f"budget: {error}") from None


@dataclass(frozen=True)
class Job:
    """What every method is given, so that none sees more than another.

    Attributes:
        plm: name or folder of the PLM, as `LocalPLM.load` takes it.
        plm_dtype: precision that it is loaded in.
        task: its template makes the prompts.
        train: the examples to adapt to.
        dev: examples for settings that are chosen without training (k, temperature and lambda of kNN-LM).
        seed: of everything random in training.
        budget: of training.
    """

    plm: str
    plm_dtype: str | None
    task: Task
    train: tuple[Example, ...]
    dev: tuple[Example, ...]
    seed: int
    budget: Budget


@dataclass(frozen=True)
class Trained:
    """What `train` reports.

    Attributes:
        trainable_parameters: numbers that training changed (kNN-LM: 0).
        seconds: of training, without loading libraries.
        curve: one entry an epoch, the first one before training: `epoch`, `seconds` so far, `held_out_loss` (mean
            cross-entropy per held-out target token, in nats), and `train_loss` from epoch 1 on.
    """

    trainable_parameters: int
    seconds: float
    curve: tuple[Mapping[str, float], ...] = field(default_factory=tuple)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values."""
        return asdict(self) | {"curve": [dict(point) for point in self.curve]}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Trained:
        """The inverse of `to_dict`."""
        return cls(values["trainable_parameters"], values["seconds"], tuple(values["curve"]))


class Adapted(ABC):
    """An adapted PLM; a context manager, which leaves the PLM as it was."""

    @property
    def chosen(self) -> Mapping[str, Any]:
        """What was chosen or found on dev without training, JSON-ready, for the result."""
        return {}

    @property
    @abstractmethod
    def disk_bytes(self) -> int:
        """What must be kept to generate with it, the PLM apart."""

    @abstractmethod
    def generate(self, sources: Sequence[str], *, batch_size: int = 32) -> Generated:
        """Texts of sources, greedily, in their order; see `pema.generation.decoding.generate`."""

    @abstractmethod
    def perplexity(self, examples: Sequence[Example]) -> float:
        """Exponential of the mean -log P(y | c) over all target tokens, end-of-sequence included, c = [I; X; y_<i]."""

    def close(self) -> None:  # noqa: B027
        """Leave the PLM as it was; nothing happens the second time."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


@dataclass(frozen=True)
class Method(ABC):
    """One way of adapting a PLM; its fields are its settings, each with its meaning, default and check.

    Attributes:
        name: what configurations call it.
        shared: whether what `prepare` makes is the same for every method and seed with equal `prepared_by`.
        seeded: whether the seed changes anything; where it does not, one run stands for all.
    """

    name: ClassVar[str]
    shared: ClassVar[bool] = False
    seeded: ClassVar[bool] = True

    def __post_init__(self) -> None:
        try:
            check(self)
        except ConfigError as error:
            raise ConfigError(f"{self.name}: {error}") from None

    @property
    @abstractmethod
    def needs(self) -> Needs:
        """What it asks of the PLM owner."""

    @property
    def prepared_by(self) -> Mapping[str, Any] | None:
        """The settings that `prepare` depends on, None where there is nothing to prepare."""
        return None

    @property
    def implied(self) -> Mapping[str, Any]:
        """JSON-ready values that a name among the settings (a preset) stands for, so that a change of them is seen."""
        return {}

    @property
    def trained_by(self) -> Mapping[str, Any]:
        """The settings that `train` depends on: all, unless some only matter in `open`."""
        return self.settings()

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> Self:
        """The method with these settings, and its defaults for the others.

        Raises:
            ConfigError: a setting that it does not have, or one out of range.
        """
        among([each.name for each in fields(cls)], settings, cls.name)
        return cls(**settings)

    def settings(self) -> dict[str, Any]:
        """JSON-ready values of all settings."""
        return {each.name: getattr(self, each.name) for each in fields(self)}

    def prepare(self, plm: LocalPLM, job: Job, output: Path) -> None:  # noqa: B027
        """Make what the PLM owner hands out, in the new folder `output`."""

    @abstractmethod
    def train(self, job: Job, prepared: Path, output: Path) -> Trained:
        """Adapt to `job.train`, and keep what `open` needs in the new folder `output`.

        Args:
            job: what is given.
            prepared: the folder that `prepare` filled; it does not exist where there is nothing to prepare.
            output: an empty folder.

        Raises:
            PemaError: training cannot go on; the message says why.
        """

    @abstractmethod
    def open(self, plm: LocalPLM, job: Job, prepared: Path, trained: Path) -> Adapted:
        """The adapted PLM from what the other stages left; `plm` is the one that `prepare` was given."""
