"""Typed records of the files in a results folder, checked when they are written and when they are read."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from functools import cached_property
from statistics import fmean, stdev
from typing import Any, Literal

from pema.errors import ConfigError
from pema.evaluation.notation import is_better, notation
from pema.schema import SEED, check, option, require, short
from pema.tasks.example import Example

ACCELERATOR, CUT_TEXTS = "train_peak_accelerator_bytes", "cut_texts"
"""Names of two costs: one that only runs on an accelerator have, and texts truncated at the token limit."""

SELDOM = (ACCELERATOR, CUT_TEXTS)
"""Costs without a column in tables if no run has any."""


@dataclass(frozen=True)
class Record:
    """Base class of records: fields with types and limits; see `pema.schema`."""

    def __post_init__(self) -> None:
        check(self)

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-ready values, without unknown values that may be missing in a file."""
        values = {each.name: getattr(self, each.name) for each in fields(self)}
        optional = {each.name for each in fields(self) if each.default is not MISSING}
        return {name: _plain(value) for name, value in values.items() if value is not None or name not in optional}


def _plain(value: Any) -> Any:  # noqa: ANN401
    if is_dataclass(value):
        return value.to_dict() if isinstance(value, Record) else vars(value)
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


@dataclass(frozen=True, kw_only=True)
class Signature(Record):
    """Origin of numbers; see `pema.signature.signature`."""

    config: Mapping[str, Any]
    seed: int | None
    versions: Mapping[str, Any]
    commit: str | None
    machine: Mapping[str, Any]
    time: str | None = None


@dataclass(frozen=True, kw_only=True)
class Score(Record):
    """Value of a metric, the signature of its computation, and its number of texts if these are not all."""

    value: float
    signature: str
    texts: int | None = option(None, least=0)


@dataclass(frozen=True, kw_only=True)
class Costs(Record):
    """Costs of a run; None if not measured.

    Attributes:
        trainable_parameters: number of trained parameters.
        prepare_seconds: time of the PLM owner's part.
        train_seconds: training time, without loading libraries.
        train_peak_bytes: peak resident memory of the training process, without that of the libraries.
        seconds_per_token: time of generation per token.
        generated_tokens: number of tokens generated for all test examples.
        disk_bytes: size of the files to keep, without the PLM.
        train_peak_accelerator_bytes: peak memory on the accelerator.
        cut_texts: number of outputs that ended at the length limit.
    """

    trainable_parameters: int | None = option(least=0)
    prepare_seconds: float | None = option(least=0.0)
    train_seconds: float | None = option(least=0.0)
    train_peak_bytes: int | None = option(least=0)
    seconds_per_token: float | None = option(least=0.0)
    generated_tokens: int | None = option(least=0)
    disk_bytes: int | None = option(least=0)
    train_peak_accelerator_bytes: int | None = option(None, least=0)
    cut_texts: int | None = option(None, least=0)


@dataclass(frozen=True, kw_only=True)
class Needs(Record):
    """Needs of a method from the PLM owner; see `pema.methods.contract.Needs`."""

    weights: Literal["none", "some", "all"]
    targets_at_owner: bool
    gradients: bool


@dataclass(frozen=True, kw_only=True)
class Point(Record):
    """A point of a learning curve; see `pema.methods.contract.Trained`."""

    epoch: float
    seconds: float
    held_out_loss: float
    train_loss: float | None = None


@dataclass(frozen=True, kw_only=True)
class Trial(Record):
    """Settings that were compared on dev.

    Attributes:
        settings: the settings.
        dev_perplexity: perplexity of the dev targets; None if it is infinite, or if the PLM does not give it.
        dev_score: score of the texts for dev by the metric of the choice (`choose_by` in the run's signature); None if
            perplexity decided, or if the metric is not defined on these texts.
    """

    settings: Mapping[str, Any]
    dev_perplexity: float | None
    dev_score: float | None = None


@dataclass(frozen=True, kw_only=True)
class Run(Record):
    """The result of one run: `RUN.json`.

    Attributes:
        run: name of the run.
        label: label of its line in the table.
        method: name of the method.
        settings: settings of the method, including those chosen on dev.
        seed: random seed of training.
        scores: scores on the test examples, by metric.
        dev_perplexity: perplexity on the dev examples; None if it is infinite, or if the PLM does not give it.
        trials: settings compared on dev; empty if there was nothing to choose.
        costs: costs of the run.
        needs: needs of the method from the PLM owner.
        curve: learning curve of training.
        signature: origin of the numbers.
        chosen: values that the method chose on dev without training.
        training_helped: whether training lowered the held-out loss; None without a learning curve. If not, the
            weights of step 0 were kept.
    """

    run: str
    label: str
    method: str
    settings: Mapping[str, Any]
    seed: int = option(least=0, most=SEED)
    scores: Mapping[str, Score]
    dev_perplexity: float | None
    trials: tuple[Trial, ...]
    costs: Costs
    needs: Needs
    curve: tuple[Point, ...]
    signature: Signature
    chosen: Mapping[str, Any] = field(default_factory=dict)
    training_helped: bool | None = None


@dataclass(frozen=True, kw_only=True)
class DataFacts(Record):
    """The data of an experiment: name, digest, and number of examples of each part."""

    name: str
    sha256: str
    train: int = option(least=0)
    dev: int = option(least=0)
    test: int = option(least=0)


OF_PLM: dict[str, type] = {"name": str, "d": int, "vocabulary_size": int, "parameters": int}
"""Facts that are known of every PLM; its description contains more."""


@dataclass(frozen=True, kw_only=True)
class ExperimentFacts(Record):
    """Facts common to all runs of an experiment: `experiment.json`.

    Attributes:
        name: name of its folder.
        title: title in reports.
        kind: `compare` or `sweep`.
        task: name of the task.
        data: data of the experiment.
        plm: description of the PLM.
        seeds: seeds of the runs.
        metrics: names of metrics, the main one first.
        reference: label of the line from which differences are marked.
        methods: labels of the lines, in the table's order.
        signature: origin of these facts.
        template: the prompt's template.
        axes: values of every swept setting, of a sweep.
        budget: limits of training for every method.
        runs: names of the planned runs, by label.
    """

    name: str
    title: str
    kind: Literal["compare", "sweep"]
    task: str
    data: DataFacts
    plm: Mapping[str, Any]
    seeds: tuple[int, ...] = option(least=0, most=SEED)
    metrics: tuple[str, ...]
    reference: str | None
    methods: tuple[str, ...]
    signature: Signature
    template: str | None = None
    axes: Mapping[str, Any] | None = None
    budget: Mapping[str, Any] | None = None
    runs: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, kind in OF_PLM.items():
            if name not in self.plm:
                raise ConfigError(f"'plm.{name}' is missing.")
            require(f"plm.{name}", self.plm[name], kind)
        for name, values in (("metrics", self.metrics), ("methods", self.methods)):
            if not values or len(set(values)) < len(values):
                raise ConfigError(f"{name} is {short(values)}, not a list of different names.")
        if self.kind == "sweep" and self.axes is None:
            raise ConfigError("'axes' is missing.")
        for label, names in ({} if self.runs is None else self.runs).items():
            require(f"runs.{label}", names, tuple[str, ...])


@dataclass(frozen=True, kw_only=True)
class Interval(Record):
    """A mean over seeds, their standard deviation, and the 95 % interval of the mean over test sentences.

    `texts` is the minimum number of texts that a seed's value rests on, if the metric ignores some of the test set.
    """

    mean: float
    std: float | None
    low: float
    high: float
    texts: int | None = option(None, least=0)


@dataclass(frozen=True, kw_only=True)
class NoHelp(Record):
    """A run whose training did not help.

    Attributes:
        run: name of the run.
        reason: `step 0`: the held-out loss never fell, so the weights from before training were kept; `same texts`: it
            generates what the PLM alone generates.
    """

    run: str
    reason: Literal["step 0", "same texts"]


@dataclass(frozen=True, kw_only=True)
class Row(Record):
    """A line of the table: its label, its number of seeds, its metrics, and its runs whose training did not help."""

    label: str
    seeds: int = option(least=1)
    metrics: Mapping[str, Interval]
    no_help: tuple[NoHelp, ...] | None = None


@dataclass(frozen=True, kw_only=True)
class Difference(Record):
    """Difference between two lines in a metric; see `pema.evaluation.significance`."""

    label: str
    reference: str
    metric: str
    difference: float
    low: float
    high: float
    p_value: float = option(least=0.0, most=1.0)
    significant: bool

    @property
    def mark(self) -> str:
        """`+` if the line is significantly better, `-` if it is significantly worse, else empty."""
        return "" if not self.significant else "+" if is_better(self.metric, self.difference) else "-"


Differences = Mapping[tuple[str, str], Difference]
"""Differences by label and metric."""


@dataclass(frozen=True, kw_only=True)
class Comparison(Record):
    """The comparison of an experiment's lines on the test examples: `comparison.json`."""

    rows: tuple[Row, ...]
    differences: tuple[Difference, ...]
    signature: Signature

    def by_reference(self) -> dict[str, Differences]:
        """Return the differences by reference."""
        grouped: dict[str, dict[tuple[str, str], Difference]] = {}
        for each in self.differences:
            grouped.setdefault(each.reference, {})[each.label, each.metric] = each
        return dict(grouped)


@dataclass(frozen=True)
class Results:
    """Results of one comparison or sweep, for tables, plots and pages.

    Attributes:
        about: facts common to its runs.
        comparison: comparison on the test examples.
        runs: runs of every label, in the order of the table and then of the seeds.
        outputs: generated texts for the test examples, by run; empty if they were not read.
        examples: the test examples, or None if the results do not contain them.
        missing: names of planned runs that are not finished.
        uncompared: names of finished runs that the comparison does not cover yet.
    """

    about: ExperimentFacts
    comparison: Comparison
    runs: Mapping[str, tuple[Run, ...]]
    outputs: Mapping[str, Sequence[str]] = field(default_factory=dict)
    examples: Sequence[Example] | None = None
    missing: tuple[str, ...] = ()
    uncompared: tuple[str, ...] = ()

    @cached_property
    def metrics(self) -> tuple[str, ...]:
        """Names of metrics, the main one first; those from another environment come last."""
        return tuple(dict.fromkeys([*self.about.metrics, *self.comparison.rows[0].metrics]))

    @cached_property
    def rows(self) -> dict[str, Row]:
        """By label."""
        return {row.label: row for row in self.comparison.rows}

    @cached_property
    def differences(self) -> dict[str, Differences]:
        """Differences by reference."""
        return self.comparison.by_reference()

    def difference(self, reference: str | None, label: str, metric: str) -> Difference | None:
        """Return the difference of a line from a reference; None if they were not compared."""
        return None if reference is None else self.differences.get(reference, {}).get((label, metric))

    def best(self, metric: str) -> float:
        """Return the best mean of a metric."""
        means = (row.metrics[metric].mean for row in self.rows.values())
        return min(means) if notation(metric).lower_is_better else max(means)

    def cost(self, label: str, name: str) -> float | None:
        """Return the mean of a cost over a line's seeds; None if it was not measured."""
        known = self._known(label, name)
        return fmean(known) if known else None

    def cost_spread(self, label: str, name: str) -> float:
        """Return the standard deviation of a cost over a line's seeds; 0 for a single seed."""
        known = self._known(label, name)
        return stdev(known) if len(known) > 1 else 0.0

    def cost_columns(self, names: Iterable[str]) -> list[str]:
        """Return the costs that need a column: those in `SELDOM` only if a run has some."""
        return [name for name in names if name not in SELDOM or any(self.cost(label, name) for label in self.runs)]

    def _known(self, label: str, name: str) -> list[float]:
        values = (getattr(run.costs, name) for run in self.runs[label])
        return [float(value) for value in values if value is not None]
