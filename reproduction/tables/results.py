"""Committed results of comparisons and sweeps, line by line, for tables and plots."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from pema.errors import DataError
from pema.evaluation.notation import metric_name, score_text
from pema.experiments.formats import scaled
from pema.experiments.layout import COMET
from pema.experiments.reader import assemble, record, scored_elsewhere
from pema.experiments.records import Comparison, ExperimentFacts, Results, Run
from reproduction.lines import LABELS, RUN, TEXTS, read_lines, read_runs

DEV, PARAMETERS = "dev_perplexity", "trainable_parameters"
OF_COSTS = {PARAMETERS: ("trained parameters", scaled)}
"""Costs that are also measures: titles and formats."""
PLM = "plm"


def title_of(measure: str) -> str:
    """Return the heading of a metric, of the dev perplexity or of a cost."""
    return OF_COSTS[measure][0] if measure in OF_COSTS else metric_name(measure)


def text_of(measure: str, value: float | None) -> str:
    """Format a metric, a dev perplexity or a cost."""
    return OF_COSTS[measure][1](value) if measure in OF_COSTS else score_text(measure, value)


@dataclass(frozen=True)
class Line:
    """A line of the table: the runs of one label, one per seed.

    Attributes:
        results: that the line is of.
        label: what the results call it.
    """

    results: Results
    label: str

    @property
    def runs(self) -> Sequence[Run]:
        """Runs in the order of their seeds."""
        return self.results.runs[self.label]

    @property
    def is_plm(self) -> bool:
        """Whether it is the PLM alone."""
        return self.runs[0].method == PLM

    @property
    def title(self) -> str:
        """Label, with the settings of the method's grid that were chosen on dev."""
        run = self.runs[0]
        return ", ".join([self.label, *(f"{name}={run.settings[name]}" for name in run.signature.config["grid"])])

    def setting(self, name: str) -> Any:  # noqa: ANN401
        """Return the value of a setting, None for its default."""
        return self.runs[0].settings.get(name)

    def named_without(self, *names: str) -> str:
        """Return the label without these settings, written as `name=value` or as the value alone."""
        given = self.runs[0].settings
        left_out = {form for name in names if name in given for form in (f"{name}={given[name]}", f"{given[name]}")}
        return ", ".join(part for part in self.label.split(", ") if part not in left_out)

    def mark(self, metric: str) -> str:
        """Return `+` or `-` if it is significantly better or worse than the reference."""
        difference = self.results.difference(self.results.about.reference, self.label, metric)
        return "" if difference is None else difference.mark

    def values(self, measure: str) -> list[float]:
        """Return a metric, the dev perplexity or a cost of every run; empty if a run lacks it."""
        values = []
        for run in self.runs:
            if measure == DEV:
                value = run.dev_perplexity
            elif measure in OF_COSTS:
                value = getattr(run.costs, measure)
            else:
                value = run.scores[measure].value
            if value is None:
                return []
            values.append(float(value))
        return values

    def mean(self, measure: str) -> float | None:
        """Return the mean over seeds."""
        values = self.values(measure)
        return fmean(values) if values else None

    def spread(self, measure: str) -> float | None:
        """Return the standard deviation over seeds; None for a single seed."""
        values = self.values(measure)
        return stdev(values) if len(values) > 1 else None

    def text(self, measure: str) -> str:
        """Format the mean over seeds, and the spread if there are several."""
        text = text_of(measure, self.mean(measure))
        spread = self.spread(measure)
        return text if spread is None else f"{text} ± {text_of(measure, spread)}"


def lines_of(results: Results) -> list[Line]:
    """Return the lines in the table's order."""
    return [Line(results, label) for label in results.about.methods]


def read_run(line: dict[str, Any], where: str) -> Run:
    """Read the result of a run from its line, without further fields.

    Raises:
        DataError: it is damaged, or another version wrote it.
    """
    return record(Run, {name: value for name, value in line.items() if name not in (TEXTS, LABELS, COMET)}, where)


def read_results(file: Path) -> Results:
    """Read the file of a comparison or of a sweep.

    Raises:
        DataError: it holds no comparison, or a line is damaged or contradicts another.
    """
    parts = {name: value for line in read_lines(file) if RUN not in line for name, value in line.items()}
    if not {"experiment", "comparison"} <= parts.keys():
        raise DataError(f"{file} lacks the line `experiment` or `comparison`: pack the folder of an experiment.")
    about = record(ExperimentFacts, parts["experiment"], str(file))
    comparison = record(Comparison, parts["comparison"], str(file))
    runs = [
        scored_elsewhere(read_run(line, f"{file}, run {name}"), line.get(COMET), comparison, f"{file}, run {name}")
        for name, line in read_runs(file).items()
    ]
    return assemble(about, comparison, runs, str(file))
