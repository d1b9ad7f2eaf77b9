"""The interface of adaptation methods: their inputs, stages and results.

A run has three stages, so that the cost of each can be measured separately:

- `prepare`, at the PLM owner: build what the owner hands out (a memory, an emulator). Methods with the same needs share
  the result.
- `train`, in a separate process: adapt the PLM to the task. Its peak memory is the method's training memory.
- `open`: load the adapted PLM, which generates texts and scores targets.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from pema.errors import ConfigError
from pema.memory.config import BuildConfig
from pema.owner.contract import PLM, Contexts
from pema.schema import among, check, documented, option

if TYPE_CHECKING:
    from pema.generation.classification import Classification
    from pema.generation.decoding import GeneratedTexts
    from pema.owner.local import LocalPLM
    from pema.tasks.example import Example
    from pema.tasks.registry import Task


MOST = 1_000_000
"""Maximum number of epochs, trials or steps."""

Requirement = Literal["weights", "probabilities", "likelihoods"] | Contexts
"""What a method may require of a PLM beyond greedy texts: its weights in this process; the probabilities of all tokens
in generation; the likelihoods of targets; `teacher` contexts; `predicted` contexts."""


@dataclass(frozen=True)
class Needs:
    """Requirements of a method on the PLM owner.

    Attributes:
        weights: the part of the PLM's weights, apart from the LM head, that the data owner must receive: none, some (or
            a compressed substitute for the rest), or all.
        targets_at_owner: whether the PLM owner sees the training targets if it keeps its weights to itself.
        gradients: whether training computes gradients through the PLM's layers.
    """

    weights: Literal["none", "some", "all"]
    targets_at_owner: bool
    gradients: bool


@documented
@dataclass(frozen=True)
class Budget:
    """Training budget, the same for all methods of a comparison."""

    called: ClassVar[str] = "[budget]"

    trials: int = option(
        4,
        "Maximum number of candidates trained and compared on dev; a schedule alone needs no training and is free.",
        least=1,
        most=MOST,
    )
    epochs: int = option(30, "Maximum number of passes over the training examples.", least=1, most=MOST)
    patience: int = option(
        3, "Number of epochs without a lower held-out loss after which training stops.", least=1, most=MOST
    )
    dev_fraction: float = option(
        0.1,
        "Fraction of the training examples held out for early stopping and fitted schedules, drawn with the seed.",
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
    """Inputs of a run, identical for all methods, so that the comparison is fair.

    Attributes:
        plm: name of the PLM, as `open_plm` takes it.
        plm_dtype: precision in which the PLM is loaded, if this process does.
        task: the task; its template builds the prompts.
        train: the training examples.
        dev: examples for settings that are chosen without training (k, temperature and lambda of kNN-LM).
        seed: random seed of training.
        budget: training budget.
        device: device of training: `auto` (an accelerator if there is one), cpu, cuda, ...
        batch_tokens: maximum number of tokens per batch when a memory is built; None: suited to the device.
        decoding: settings of `pema.generate` for all texts, such as `max_new_tokens` and `stop`; training does not
            depend on them.
    """

    plm: str
    plm_dtype: str | None
    task: Task
    train: tuple[Example, ...]
    dev: tuple[Example, ...]
    seed: int
    budget: Budget
    device: str = "auto"
    batch_tokens: int | None = BuildConfig.batch_tokens
    decoding: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class TrainingReport:
    """Report of `train`.

    Attributes:
        trainable_parameters: number of trained parameters (kNN-LM: 0).
        seconds: training time in seconds, without loading libraries.
        curve: one entry per epoch, the first one before training: `epoch`, `seconds` so far, `held_out_loss` (mean
            cross-entropy per held-out target token, in nats), and `train_loss` from epoch 1 on.
        diverged_at: number of the step at which a loss was not finite, so that training stopped early with the best
            weights until then; None if it did not diverge.
    """

    trainable_parameters: int
    seconds: float
    curve: tuple[Mapping[str, float], ...] = field(default_factory=tuple)
    diverged_at: int | None = None

    @property
    def best_epoch(self) -> int | None:
        """The epoch whose weights are kept, that of the lowest held-out loss; None without a learning curve."""
        if not self.curve:
            return None
        return int(min(self.curve, key=lambda point: point["held_out_loss"])["epoch"])

    @property
    def helped(self) -> bool | None:
        """Whether training lowered the held-out loss; None without a learning curve."""
        return None if len(self.curve) < 2 and self.diverged_at is None else self.best_epoch != 0

    @property
    def divergence(self) -> str:
        """What to say about training that diverged; "" if it did not."""
        if self.diverged_at is None:
            return ""
        return (
            f"training diverged: a loss is not finite at step {self.diverged_at}; the weights of epoch "
            f"{self.best_epoch} are kept. Lower learning_rate, or lengthen the warm-up."
        )

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-ready values."""
        return asdict(self) | {"curve": [dict(point) for point in self.curve]}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TrainingReport:
        """Build the report from the values of `to_dict`."""
        curve = tuple(values["curve"])
        return cls(values["trainable_parameters"], values["seconds"], curve, values.get("diverged_at"))


class AdaptedModel(ABC):
    """Adapted PLM; a context manager that restores the PLM on exit."""

    @property
    def chosen(self) -> Mapping[str, Any]:
        """Values that were chosen or measured on dev without training, JSON-ready, for the result."""
        return {}

    @property
    @abstractmethod
    def disk_bytes(self) -> int:
        """Bytes that must be stored to generate with it, apart from the PLM."""

    @abstractmethod
    def generate(self, sources: Sequence[str | Example], **settings: Any) -> GeneratedTexts:  # noqa: ANN401
        """Generate one text per source, in the order of the sources; see `pema.generation.decoding`.

        Args:
            sources: the source texts.
            settings: decoding settings that differ from the job's.
        """

    def classify(
        self,
        sources: Sequence[str | Example],
        labels: Sequence[str],
        **settings: Any,  # noqa: ANN401
    ) -> Classification:
        """Choose the label of each source with the highest P(label, end | prompt); see `pema.classify`.

        Args:
            sources: the source texts.
            labels: the labels to choose from.
            settings: `batch_size` and `probabilities` of `classify`.

        Raises:
            ConfigError: the method does not score labels.
        """
        raise ConfigError(
            f"{type(self).__name__} does not score labels: define its method classify, or leave out label_accuracy."
        )

    @abstractmethod
    def perplexity(self, examples: Sequence[Example]) -> float:
        """Compute exp(mean -log P(y | c)) over all target tokens, end-of-sequence included, with c = [I; X; y_<i]."""

    def close(self) -> None:  # noqa: B027
        """Restore the PLM; further calls do nothing."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


@dataclass(frozen=True)
class Method(ABC):
    """Adaptation method; its fields are its settings, each with its meaning, default and limits.

    Attributes:
        name: name of the method in configurations.
        seeded: whether the seed has an effect; if not, one run represents all seeds.
        default_grid: candidates for settings that a comparison chooses on dev if the user gives neither a value nor
            candidates; as many of the first ones as the budget has trials for.
    """

    name: ClassVar[str]
    seeded: ClassVar[bool] = True
    default_grid: ClassVar[Mapping[str, Sequence[Any]]] = {}

    def __post_init__(self) -> None:
        try:
            check(self)
        except ConfigError as error:
            raise ConfigError(f"{self.name}: {error}") from None

    def require_libraries(self) -> None:  # noqa: B027
        """Refuse the method if an optional library that it imports is not installed; nothing is imported.

        Raises:
            ConfigError: a library is missing; the message gives the command that installs it.
        """

    def require_examples(self, train: Sequence[Example], dev: Sequence[Example]) -> None:  # noqa: B027
        """Refuse settings that do not suit the number of examples, when the configuration is read; no PLM is opened.

        Raises:
            ConfigError: the message names the setting, and the remedy.
        """

    def require_suited(self, plm: PLM, task: Task) -> None:  # noqa: B027
        """Refuse settings that do not suit a PLM or its prompts for a task, before the first run.

        Raises:
            PemaError: the message names the setting, and the remedy.
        """

    @property
    @abstractmethod
    def needs(self) -> Needs:
        """Requirements on the PLM owner."""

    @property
    def requires(self) -> frozenset[Requirement]:
        """What the method requires of the PLM; a PLM that lacks some of it is refused before anything is run."""
        return frozenset({"probabilities" if self.needs.weights == "none" else "weights"})

    @property
    def prepared_by(self) -> Mapping[str, Any] | None:
        """Settings that `prepare` depends on; None where there is nothing to prepare."""
        return None

    @property
    def shared(self) -> bool:
        """Whether the result of `prepare` is the same for all methods and seeds with equal `prepared_by`."""
        return False

    @property
    def implied(self) -> Mapping[str, Any]:
        """JSON-ready values behind a name among the settings (a preset), so that a change of the preset is detected."""
        return {}

    @property
    def trained_by(self) -> Mapping[str, Any]:
        """Settings that `train` depends on: all except those that only affect `open`."""
        return self.settings()

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> Self:
        """Build the method with these settings, and the defaults for the others.

        Raises:
            ConfigError: a setting is unknown or out of range.
        """
        among("setting", settings, [each.name for each in fields(cls)], cls.name)
        return cls(**settings)

    def settings(self) -> dict[str, Any]:
        """Return JSON-ready values of all settings."""
        return {each.name: getattr(self, each.name) for each in fields(self)}

    def prepare(self, plm: PLM, job: Job, output: Path) -> None:  # noqa: B027
        """Write what the PLM owner hands out to the new folder `output`."""

    @abstractmethod
    def train(self, job: Job, prepared: Path, output: Path) -> TrainingReport:
        """Adapt to `job.train`, and write what `open` needs to the new folder `output`.

        Args:
            job: the inputs of the run.
            prepared: the folder written by `prepare`; it does not exist where there is nothing to prepare.
            output: an empty folder.

        Raises:
            PemaError: training cannot continue; the message gives the reason.
        """

    @abstractmethod
    def open(self, plm: PLM, job: Job, prepared: Path, trained: Path) -> AdaptedModel:
        """Load the adapted PLM from the output of the other stages; `plm` is the PLM that `prepare` received."""


def with_weights(plm: PLM, method: str) -> LocalPLM:
    """Return a PLM whose weights are in this process.

    Raises:
        ConfigError: they are not.
    """
    from pema.owner.local import LocalPLM

    if not isinstance(plm, LocalPLM):
        raise ConfigError(
            f"{method} needs the PLM's weights in this process, and {plm.description.name} is run elsewhere: give the "
            "folder, GGUF file or hub name of a PLM that transformers loads."
        )
    return plm
