# ruff: noqa: RUF009  (`option` is `dataclasses.field` with the meaning and limits beside the default)
"""Description of an adapter (`AdapterConfig`) and settings of its training (`TrainConfig`)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from pema.adapter.schedule import Fitted, NamedSchedule, get_schedule, suited
from pema.console import note
from pema.errors import ConfigError
from pema.extras import require_library
from pema.owner.contract import Contexts, PLMDescription, Tap
from pema.schema import NOT_EMPTY, SEED, check, documented, from_json, option, require, short

Activation = Literal["none", "gelu"]
Vocabulary = Literal["full", "seen", "own"]
TrainedVocabulary = Literal["full", "seen", "own", "sampled", "auto"]
Init = Literal["random", "pca"]
Reconstruction = Literal["closed_form", "sgd"]
Optimizer = Literal["adam", "adamw"]
Decay = Literal["none", "linear", "cosine"]
Precision = Literal["auto", "float32", "bfloat16"]

WIDEST = 1 << 20
"""Largest rank."""

MOST = 1_000_000
"""Maximum number of epochs, and of steps between lines of the log or between checkpoints."""

LONGEST_TEXT = (1 << 31) - 1
"""Maximum number of tokens of a text."""

LARGEST = 1e38
"""Largest learning rate: the limit of float32. Training with a rate that is too large stops when it diverges."""

TEXT_FIGURES = ("unit", "accountant")
"""Names of the figures of a training that are texts."""

SAMPLE = 2048
"""Number of tokens drawn per step with vocabulary="sampled", in addition to the most frequent ones."""

CORE = 8192
"""Maximum number of tokens that are in every step with vocabulary="sampled": the most frequent ones of the memory."""

PAYS = 4
"""Minimum ratio of V to the tokens of a step at which vocabulary="auto" means "sampled"."""

SMALLEST_BATCH = 64
"""Minimum number of pairs in a step that `least_steps` makes smaller."""

WIDEST_COPY = 1 << 14
"""Largest width of copying."""

WINDOW = (0, -1, -2, -3, 1)
"""Places, relative to a token of the prompt, of the tokens whose rows of W_hd make its key of copying."""

MATCHES = 4
"""Number of classes of a match of copying: 0, 1, 2, or at least 3 tokens."""

USES = 3
"""Number of classes of earlier uses of a candidate of copying: 0, 1, or more."""

WIDEST_GELU = 6
"""Maximum ratio of the rank to d that `fit_rank` allows an adapter with an activation."""


def _check_shape(config: TrainConfig | AdapterConfig) -> None:
    if config.activation == "gelu" and not config.residual:
        raise ConfigError("activation='gelu' with residual=False: h_pd would lose f. Use residual=True.")
    if config.copy_width and config.vocabulary == "seen":
        raise ConfigError(
            f"copy_width={config.copy_width} with vocabulary='seen': what is copied need not occur in the memory. Use "
            "vocabulary='auto' or 'full'."
        )


UNDER_PRIVACY = {
    "kappa": (0.0, "reconstruction reads the representations without noise"),
    "init": ("random", "the principal subspace is computed from the memory without noise"),
    "vocabulary": ("full", "it would reveal which tokens occur in the memory"),
    "dev_fraction": (0.0, "early stopping reads the held-out examples without noise"),
    "dropout": (0.0, "the mask of one example would depend on which others are in its batch"),
    "copy_width": (0, "the gradients of copying are not clipped by example"),
    "least_steps": (0, "the number of pairs is not part of what the guarantee covers"),
}
"""Values of other settings that DP-SGD requires, with the reason."""


def _check_privacy(config: TrainConfig) -> None:
    epsilon, delta = config.dp_epsilon, config.dp_delta
    if (epsilon is None) != (delta is None):
        raise ConfigError(
            f"dp_epsilon={epsilon} with dp_delta={delta}: differential privacy needs both. "
            "Set dp_delta to less than 1 / the number of examples."
        )
    if epsilon is None or delta is None:
        return
    for name, value in (("dp_epsilon", epsilon), ("dp_delta", delta)):
        if value == 0:
            raise ConfigError(f"{name}={value} cannot be reached by finite noise: it must be more than 0.")
    for name, (wanted, why) in UNDER_PRIVACY.items():
        if getattr(config, name) != wanted:
            raise ConfigError(
                f"{name}={getattr(config, name)!r} with dp_epsilon={epsilon}: {why}. Use {name}={wanted!r}."
            )
    if config.clip == 0:
        raise ConfigError(f"clip=0 with dp_epsilon={epsilon}: noise hides only what is clipped. Use clip=1.")


@documented
@dataclass(frozen=True)
class TrainConfig:
    """Settings of training an adapter: steps 2 and 3 of the method.

    Raises:
        ConfigError: a value is outside its limits, or values contradict each other.
    """

    rank: int = option(512, "r, number of rows of A.", least=1, most=WIDEST)
    kappa: float = option(
        0.2, "Weight of reconstruction in the joint loss; 1 - kappa goes to prediction.", least=0.0, most=1.0
    )
    dropout: float = option(
        0.2, "Share of the entries of the adapter's input that are dropped in training.", least=0.0, below=1.0
    )
    init: Init = option("random", "Start of A: random (the paper), or pca, the principal subspace of the memory.")
    residual: bool = option(False, "h_pd = f + B_pd A f, with B_pd zero at the start.")
    activation: Activation = option("none", "gelu: h_pd = f + B_pd gelu(A norm(f)); needs residual.")
    vocabulary: TrainedVocabulary = option(
        "full",
        "seen: P_PEMA covers only target tokens that occur in the memory. sampled: it covers all, and the softmax of "
        "training has the most frequent of these and a random sample of the others. auto: sampled where that is at "
        "most a quarter of V, else full. own: as seen, with an output matrix of the adapter's own, for an API's tokens "
        "only.",
    )
    copy_width: int = option(
        0,
        "Width of the attention that copies tokens of the prompt; 0: no copying. Needs a memory with prompts.",
        least=0,
        most=WIDEST_COPY,
    )
    copy_least: float = option(
        0.0,
        "Minimum share of the target tokens that occur in their prompts; if it is lower, nothing is copied.",
        least=0.0,
        most=1.0,
    )
    reconstruction: Reconstruction = option("closed_form", "How B_rct is computed: closed_form, or sgd (the paper).")
    reconstruction_learning_rate: float = option(
        1e-3, "Adam's learning rate with reconstruction=sgd.", least=0.0, most=1e3
    )
    reconstruction_epochs: int = option(
        200, "Maximum number of passes over the memory with reconstruction=sgd.", least=1, most=MOST
    )
    optimizer: Optimizer = option("adam", "adam or adamw.")
    learning_rate: float = option(1e-3, "Peak learning rate.", least=0.0, most=LARGEST)
    weight_decay: float = option(0.0, "Decoupled weight decay of adamw.", least=0.0, most=1e3)
    warmup: float = option(
        0.0, "Share of all steps over which the learning rate rises from zero.", least=0.0, below=1.0
    )
    decay: Decay = option("none", "How the learning rate falls to zero after the warm-up: none, linear or cosine.")
    clip: float = option(
        1.0,
        "Maximum norm of the gradient; 0: no clipping. With dp_epsilon: of one example's gradient.",
        least=0.0,
        most=1e9,
    )
    epochs: int = option(30, "Maximum number of passes over the memory.", least=1, most=MOST)
    batch_size: int = option(
        256, "Pairs in a step. With dp_epsilon: examples in a step, on average over the steps.", least=1, most=1 << 24
    )
    least_steps: int = option(
        0, "Minimum number of steps per epoch: with few pairs, a step has fewer of them, but at least 64.", most=MOST
    )
    dev_fraction: float = option(
        0.1, "Share of the examples held out for early stopping; 0: none.", least=0.0, below=1.0
    )
    patience: int = option(3, "Epochs without a lower held-out loss before training stops.", least=1, most=MOST)
    seed: int = option(0, "Random seed.", least=0, most=SEED)
    fit_rank: bool = option(
        False, "Reduce the rank to what the PLM's width allows, with a note, instead of refusing it."
    )
    precision: Precision = option(
        "auto", "Arithmetic of the matrix products; auto: bfloat16 where the processor has it."
    )
    device: str = option("auto", "Device of training; auto: an accelerator if there is one.")
    checkpoint_every: int = option(0, "Steps between checkpoints; 0: one per epoch.", least=0, most=MOST)
    log_every: int = option(50, "Steps between lines of the log; 0: one per epoch.", least=0, most=MOST)
    dp_epsilon: float | None = option(
        None,
        "Train with DP-SGD; maximum epsilon per example (docs/private-training.md).",
        least=0.0,
        most=1e6,
    )
    dp_delta: float | None = option(
        None, "The delta of DP-SGD: less than 1 / the number of examples.", least=0.0, below=1.0
    )

    def __post_init__(self) -> None:
        check(self)
        _check_shape(self)
        if self.activation == "gelu" and self.kappa > 0:
            raise ConfigError(
                f"kappa={self.kappa} with activation='gelu': reconstruction is linear. "
                "Use kappa=0 or activation='none'."
            )
        if self.copy_width and self.kappa > 0:
            raise ConfigError(f"copy_width={self.copy_width} with kappa={self.kappa}: use kappa=0.")
        if self.weight_decay > 0 and self.optimizer == "adam":
            raise ConfigError(f"weight_decay={self.weight_decay} with optimizer='adam': use optimizer='adamw'.")
        _check_privacy(self)

    @property
    def reconstructs(self) -> bool:
        """Whether B_rct is needed: in the joint loss, or to initialise A."""
        return self.kappa > 0 or self.init == "pca"

    def with_vocabulary(self, vocabulary_size: int, seen: int) -> TrainConfig:
        """Return this config with a vocabulary for `auto`, and with `full` if the sample would be all other tokens.

        Args:
            vocabulary_size: V.
            seen: number of target tokens that occur in the memory.
        """
        vocabulary, core = self.vocabulary, min(seen, CORE)
        if vocabulary == "auto":
            vocabulary = "sampled" if PAYS * (core + SAMPLE) <= vocabulary_size else "full"
        if vocabulary == "sampled" and vocabulary_size - core < SAMPLE:
            vocabulary = "full"
        return self if vocabulary == self.vocabulary else dataclasses.replace(self, vocabulary=vocabulary)

    def with_steps(self, pairs: int) -> TrainConfig:
        """Return this config with the batch that makes `least_steps` steps of an epoch of `pairs` pairs."""
        if not self.least_steps:
            return self
        batch_size = min(self.batch_size, max(SMALLEST_BATCH, pairs // self.least_steps))
        return self if batch_size == self.batch_size else dataclasses.replace(self, batch_size=batch_size)

    def fitted(self, d: int) -> TrainConfig:
        """Return this config for a PLM of width `d`, whose rank `require_suited` accepts."""
        most = self._most_rank(d)
        if self.rank <= most or not self.fit_rank:
            return self
        note(f"rank {self.rank} becomes {most}: the PLM's representations have d = {d}.")
        return dataclasses.replace(self, rank=most)

    def require_suited(self, plm: PLMDescription) -> None:
        """Refuse settings that do not suit a PLM, before a memory is built with it.

        Raises:
            ConfigError: the rank is too large for d, and `fit_rank` is off; or the vocabulary is that of an API's
                tokens, and the PLM is none.
        """
        if self.vocabulary == "own" and not plm.is_proxy:
            raise ConfigError(
                f"vocabulary='own' is an output matrix for an API's tokens, and {plm.name} has an LM head of its own: "
                "use vocabulary='auto' or 'full'."
            )
        d, linear = plm.d, self._is_linear
        if self.rank <= self._most_rank(d) or self.fit_rank or not linear:
            return
        why = (
            "init='pca' and reconstruction have d directions"
            if self.activation == "gelu"
            else "it adds nothing to rank d"
        )
        raise ConfigError(
            f"rank={self.rank} is larger than d = {d}, and {why}: use a rank of at most {d}"
            + (", or init='random'." if self.activation == "gelu" else ", or residual=True with activation='gelu'.")
        )

    @property
    def _is_linear(self) -> bool:
        """Whether directions beyond d add nothing."""
        return self.activation == "none" or self.reconstructs

    def _most_rank(self, d: int) -> int:
        """Return the largest rank that makes sense for a PLM of width `d`."""
        return d if self._is_linear else WIDEST_GELU * d

    def require_libraries(self) -> None:
        """Refuse the settings if an optional library that the training imports is not installed; nothing is imported.

        Raises:
            ConfigError: a library is missing; the message gives the command that installs it.
        """
        if self.dp_epsilon is not None:
            require_library("dp_epsilon", "opacus", "private")

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TrainConfig:
        """Build the config from the result of `to_dict`.

        Raises:
            ConfigError: a key is unknown, or a value is invalid.
        """
        return from_json(cls, values)


def _check_training(training: Mapping[str, Any]) -> None:
    for name in ("settings", "figures", "signature"):
        require(f"training.{name}", training.get(name, {}), dict)
    for name, value in training.get("figures", {}).items():
        place = f"training.figures.{short(name)[1:-1]}"
        if value is not None and name in TEXT_FIGURES:
            require(place, value, str, line=True, longest=200)
        elif value is not None:
            require(place, value, float, least=-LARGEST, most=LARGEST)


@documented
@dataclass(frozen=True)
class AdapterConfig:
    """Description of an adapter, its PLM, its task and its training; stored as `adapter_config.json`.

    Raises:
        ConfigError: a value is outside its limits, or values contradict each other.
    """

    d: int = option(help="Width of the head's input.", least=1, most=WIDEST)
    vocabulary_size: int = option(help="V, number of rows of W_hd.", least=1, most=1 << 24)
    rank: int = option(help="r, number of rows of A.", least=1, most=WIDEST)
    residual: bool = option(False, "h_pd = f + B_pd A f.")
    activation: Activation = option("none", "gelu: h_pd = f + B_pd gelu(A norm(f)).")
    vocabulary: Vocabulary = option(
        "full",
        "seen: P_PEMA covers only target tokens that occur in the memory. own: as seen, with an output matrix U of the "
        "adapter's own instead of W_hd.",
    )
    copy_width: int = option(
        0, "k, width of the attention that copies tokens of the prompt; 0: no copying.", least=0, most=WIDEST_COPY
    )
    frame: tuple[int, int] = option(
        (0, 0),
        "Number of tokens at the start and at the end of a prompt that are not copied.",
        least=0,
        most=LONGEST_TEXT,
        longest=2,
    )
    plm: PLMDescription | None = option(None, "The PLM that the memory was built with.")
    task: str | None = option(None, "Name of the task.", line=True, longest=200)
    template: str | None = option(None, "The prompt template.")
    chat_template: str | None = option(
        None, "SHA-256 of the chat template that prompts are written in; None: plain prompts.", pattern="[0-9a-f]{64}"
    )
    system: str | None = option(None, "System prompt of the chat, if one was given.")
    contexts: Contexts | None = option(None, "Tokens that follow the prompt in the memory's contexts.")
    schedule: NamedSchedule | None = option(
        None, "Default schedule of the mixture weight; None: the one suited to the contexts."
    )
    fitted: Fitted | None = option(None, "The schedule fitted to the held-out pairs.")
    max_new_tokens: int | None = option(
        None,
        "Maximum output length in tokens if none is given, from the training targets; None: 2 SL + 16.",
        least=1,
        most=LONGEST_TEXT,
    )
    stop: tuple[str, ...] = option(
        (),
        "Strings that end a text if none are given: a line break, or a blank line, if no target contains one.",
        pattern=NOT_EMPTY,
    )
    training: Mapping[str, Any] = dataclasses.field(
        default_factory=dict, metadata={"help": "Settings, figures and signature of the training."}
    )

    def __post_init__(self) -> None:
        check(self)
        _check_shape(self)
        if self.schedule is None:
            object.__setattr__(self, "schedule", suited(self.contexts))
        if len(self.frame) != 2:
            raise ConfigError(f"frame has {len(self.frame)} items, not 2.")
        if self.activation == "none" and self.rank > self.d:
            raise ConfigError(f"rank={self.rank} is larger than d = {self.d}: use a rank of at most {self.d}.")
        if self.plm is not None and (self.plm.d, self.plm.vocabulary_size) != (self.d, self.vocabulary_size):
            raise ConfigError(
                f"d={self.d}, vocabulary_size={self.vocabulary_size} differ from those of {self.plm.name}: "
                f"{self.plm.d}, {self.plm.vocabulary_size}."
            )
        _check_training(self.training)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        for name in ("plm", "schedule", "fitted"):
            values[name] = values[name] and values[name].to_dict()
        values["stop"], values["frame"] = list(self.stop), list(self.frame)
        if not self.copy_width:  # earlier versions of pema read an adapter that does not copy
            del values["copy_width"], values["frame"]
        return values | {"training": dict(self.training)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> AdapterConfig:
        """Build the config from the result of `to_dict`.

        Raises:
            ConfigError: a key is unknown, or a value is invalid.
        """
        return from_json(cls, values)

    @property
    def copying_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the parameters of copying by name; empty without copying."""
        k, d = self.copy_width, self.d
        shapes = {"query": (k, 2 * d), "query_bias": (k,), "mix": (k, k), "keys_of": (len(WINDOW), k, d), "gate": (k,)}
        shapes |= {"match": (MATCHES, k), "use": (USES, k), "kind": (2, k)}
        shapes |= {"alpha": (2,), "match_score": (MATCHES,), "use_score": (USES,)}
        shapes |= {"gate_match": (MATCHES,), "gate_scores": (2,)}
        return shapes if k else {}

    @property
    def tap(self) -> Tap:
        """Tap of the representations that the adapter was trained on."""
        return "head_input" if self.plm is None else self.plm.tap

    def choose_schedule(self, name: str | None = None, lambda_max: float | None = None) -> NamedSchedule:
        """Return the schedule of this name, or the adapter's own.

        Args:
            name: unrolling, constant, linear, fitted or none; None: the adapter's own.
            lambda_max: initial weight instead of the schedule's own.

        Raises:
            ConfigError: see `get_schedule`; or the adapter has no fitted schedule.
        """
        assert self.schedule is not None
        if name is None and lambda_max is None:
            return self.schedule
        return get_schedule(name or self.schedule.name, lambda_max=lambda_max, fitted=self.fitted, why_not=self._why())

    def _why(self) -> str:
        """Return why the adapter has no fitted schedule, for the message."""
        settings = self.training.get("settings", {})
        if settings.get("dp_epsilon") is not None:
            return "belongs to an adapter of private training: it would be computed from examples without noise"
        if settings.get("dev_fraction") == 0:
            return "belongs to this adapter, which was trained with dev_fraction=0: nothing was held out to fit it on"
        return "belongs to this adapter: train it again to have one"
