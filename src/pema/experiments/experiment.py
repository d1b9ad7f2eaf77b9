"""A comparison or a sweep: methods, data, budget and seeds, and the lines of its table."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from pema.errors import ConfigError, PemaError
from pema.evaluation.evaluate import FORMALITY
from pema.experiments.data import Data
from pema.experiments.description import ExperimentFile
from pema.experiments.layout import LONGEST_NAME, run_name
from pema.files import digest
from pema.methods.contract import Budget, Method
from pema.methods.decoding import check_decoding
from pema.methods.registry import method_name
from pema.own import is_own, source_digest
from pema.schema import SEED, among, require, short
from pema.tasks.held_out import spread
from pema.tasks.registry import Task

Kind = Literal["compare", "sweep"]
CPU = "cpu"
PERPLEXITY = "perplexity"
EXAMPLES = "examples"
PLM = "plm"
OF_THE_RUN = (EXAMPLES, PLM)
"""Settings that every method has: the number of training examples to use, and another PLM to adapt."""


@dataclass(frozen=True)
class Entry:
    """A method as described in the config.

    Attributes:
        label: name in the table.
        method: the method's class.
        settings: settings of all its runs.
        grid: settings with candidates: `compare` chooses among them on dev, `sweep` reports all.
        choose: settings with candidates, of which a sweep chooses one on dev at every point of the grid.
        seeds: number of the experiment's seeds to run with, from the first on; None: all.
    """

    label: str
    method: type[Method]
    settings: Mapping[str, Any]
    grid: Mapping[str, Sequence[Any]]
    choose: Mapping[str, Sequence[Any]]
    seeds: int | None = None

    def lines(self, kind: Kind, trials: int) -> Iterator[Line]:
        """Yield the line of a comparison, with default candidates within `trials`; or the lines of a sweep."""
        if kind == "compare":
            if self.choose:
                name = next(iter(self.choose))
                raise ConfigError(f"{self.label}: `choose` is for sweeps: in a comparison, name {name!r} in `grid`.")
            line = Line(self.label, self.method, self.settings, self.grid, self.seeds)
            for name, values in self.method.default_grid.items():
                if name not in self.settings and name not in self.grid:
                    candidates = values[: max(1, trials // line.trainings)]
                    line = replace(line, choice={**line.choice, name: candidates})
            yield line
            return
        for point in product(self.grid):
            label = ", ".join([self.label, *(f"{name}={value}" for name, value in point.items())])
            yield Line(label, self.method, {**self.settings, **point}, self.choose, self.seeds)


@dataclass(frozen=True)
class Line:
    """A line of the table.

    Attributes:
        label: name in the table.
        method: the method's class.
        settings: settings of all its runs.
        choice: settings with candidates, one of which is chosen on dev; empty: nothing to choose.
        seeds: see `Entry`.
    """

    label: str
    method: type[Method]
    settings: Mapping[str, Any]
    choice: Mapping[str, Sequence[Any]]
    seeds: int | None = None

    def __post_init__(self) -> None:
        for candidate in self.candidates():
            try:
                require(EXAMPLES, candidate.get(EXAMPLES), int | None, least=1)
                require(PLM, candidate.get(PLM), str | None)
                build_method(self.method, candidate).require_libraries()
            except PemaError as error:
                raise ConfigError(f"{self.label}: {error}") from error
            except TypeError as error:
                raise ConfigError(f"{self.label}: a setting is of the wrong type: {error}.") from error

    def candidates(self) -> Iterator[dict[str, Any]]:
        """Yield the settings with every combination of the candidates."""
        for point in product(self.choice):
            yield {**self.settings, **point}

    @property
    def trainings(self) -> int:
        """Number of different trainings among the candidates."""
        return len({digest(dict(build_method(self.method, each).trained_by)) for each in self.candidates()})


@dataclass(frozen=True)
class Experiment:
    """A comparison or a sweep: the input of `pema compare` and `pema sweep`.

    Attributes:
        name: folder of the results.
        title: title in the report.
        kind: `compare` or `sweep`.
        task: template and default metrics.
        plm: name of the PLM, as `open_plm` takes it.
        plm_dtype: dtype of the loaded PLM; None: the library's choice.
        seeds: random seeds; every reported setting runs once with each.
        metrics: names of metrics, the main one first.
        references: labels of the lines that all others are compared with; tables mark differences from the first.
        data: training, dev and test examples.
        budget: limits of training for every method.
        entries: the methods, in the table's order.
        choose_by: metric of the texts generated for dev by which candidates are chosen, or `perplexity` of the dev
            targets; None: the first metric that the dev examples allow.
        choose_texts: maximum number of dev examples for which every candidate generates a text.
        device: device of the PLM and of training.
        batch_tokens: maximum tokens per PLM batch when a memory is built; None: suited to the device.
        batch_size: sequences per batch of generation.
        decoding: settings of generation, common to all methods; see `pema.methods.decoding`.
    """

    name: str
    title: str
    kind: Kind
    task: Task
    plm: str
    plm_dtype: str | None
    seeds: tuple[int, ...]
    metrics: tuple[str, ...]
    references: tuple[str, ...]
    data: Data
    budget: Budget
    entries: tuple[Entry, ...]
    choose_by: str | None = None
    choose_texts: int = ExperimentFile.choose_texts
    device: str = CPU
    batch_tokens: int | None = ExperimentFile.batch_tokens
    batch_size: int = ExperimentFile.batch_size
    decoding: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_decoding(self.decoding)
        labels = [entry.label for entry in self.entries]
        if not labels:
            raise ConfigError("there is nothing to run: give at least one [[methods]] table.")
        twice = {label for label in labels if labels.count(label) > 1}
        if twice:
            raise ConfigError(f"two methods have the label {sorted(twice)[0]!r}: give each its own label.")
        lines = [line.label for line in self.lines()]
        among("reference", self.references, lines)
        require("seeds", self.seeds, tuple[int, ...], least=0, most=SEED)
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ConfigError(f"seeds {list(self.seeds)} must be one or more different numbers.")
        self._require_names()
        among("choose_by", [self.choice_metric], (*self.metrics, PERPLEXITY))
        if self.choice_metric == FORMALITY and "dev" not in self.data.annotated:
            raise ConfigError(
                f"choose_by {FORMALITY!r} needs formal and informal references of dev with [F]...[/F] marks: give both "
                "in data.dev, or choose by another metric."
            )
        self._require_examples()
        for line in self.lines():
            if line.trainings > self.budget.trials:
                raise ConfigError(
                    f"{line.label}: {line.trainings} trainings of candidates are more than the budget's trials="
                    f"{self.budget.trials}: remove candidates, or increase trials."
                )

    def _require_examples(self) -> None:
        """Refuse settings that the data have too few examples for."""
        train = self.data.train
        for line in self.lines():
            for candidate in line.candidates():
                count = candidate.get(EXAMPLES)
                if count is not None and count > len(train):
                    raise ConfigError(
                        f"{line.label}: examples={count:,} is more than the {len(train):,} training examples: lower "
                        "it, or give more."
                    )
                try:
                    build_method(line.method, candidate).require_examples(train[:count], self.data.dev)
                except PemaError as error:
                    raise type(error)(f"{line.label}: {error}") from error

    def _require_names(self) -> None:
        """Refuse labels whose runs would share a file, or whose file names would be too long."""
        labels: dict[str, str] = {}
        for line in self.lines():
            name = run_name(line.label, self.seeds[-1])
            if len(name) > LONGEST_NAME:
                raise ConfigError(
                    f"the label {short(line.label)} names files and is too long: use at most {LONGEST_NAME} characters."
                )
            other = labels.setdefault(run_name(line.label, self.seeds[0]), line.label)
            if other != line.label:
                raise ConfigError(
                    f"the labels {other!r} and {line.label!r} are too similar: the runs of both would be in "
                    f"{run_name(line.label, self.seeds[0])}.json. Rename one of them: letters a to z, digits and .=+ "
                    "distinguish files."
                )

    @property
    def choice_metric(self) -> str:
        """The metric by which candidates are chosen, or `perplexity`."""
        if self.choose_by is not None:
            return self.choose_by
        allowed = (metric for metric in self.metrics if metric != FORMALITY or "dev" in self.data.annotated)
        return next(allowed, PERPLEXITY)

    @property
    def choice_numbers(self) -> list[int]:
        """The numbers of the dev examples for which candidates generate texts, evenly spaced over all of them."""
        return spread(len(self.data.dev), self.choose_texts)

    def generates_on_dev(self, line: Line) -> bool:
        """Return whether the choice among the candidates of a line needs their texts."""
        return self.choice_metric != PERPLEXITY and len(list(line.candidates())) > 1

    def lines(self) -> Iterator[Line]:
        """Yield the lines of the table, in order."""
        for entry in self.entries:
            yield from entry.lines(self.kind, self.budget.trials)

    def runs(self) -> list[tuple[Line, int]]:
        """Return every run: a line of the table with a seed."""
        return [(line, seed) for line in self.lines() for seed in self.seeds_of(line)]

    def plms(self) -> list[str]:
        """Return the names of the PLMs of all runs."""
        candidates = (candidate for line in self.lines() for candidate in line.candidates())
        return list(dict.fromkeys(candidate.get(PLM, self.plm) for candidate in candidates))

    def own_sources(self, line: Line) -> dict[str, str | None]:
        """Return the SHA-256 of the modules of the user's own tasks, metrics and methods that a line uses, by name."""
        names = (self.task.name, *self.metrics, method_name(line.method))
        return {name: source_digest(name) for name in names if is_own(name) and name.partition(":")[0] in sys.modules}

    def seeds_of(self, line: Line) -> tuple[int, ...]:
        """Return the seeds of a line: only the first one if the method does not depend on the seed."""
        return self.seeds[: line.seeds] if line.method.seeded else self.seeds[:1]


def build_method(method: type[Method], settings: Mapping[str, Any]) -> Method:
    """Build a method with its own settings, without those of the run."""
    return method.of({name: value for name, value in settings.items() if name not in OF_THE_RUN})


def product(grid: Mapping[str, Sequence[Any]]) -> Iterator[dict[str, Any]]:
    """Yield every combination of the candidates, by setting; one empty combination if there are no settings."""
    for values in itertools.product(*grid.values()):
        yield dict(zip(grid, values, strict=True))
