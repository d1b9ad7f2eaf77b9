"""What the results of a comparison or of a sweep hold, as tables and plots need it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from pema.experiments.table import NAMES, by_reference
from reproduction.lines import RUN, read_lines, read_runs

DEV, SECONDS, PARAMETERS = "dev_perplexity", "train_seconds", "trainable_parameters"
TITLES = NAMES | {DEV: "dev perplexity", SECONDS: "training (s)", PARAMETERS: "trained parameters"}
PLM = "plm"


@dataclass(frozen=True)
class Line:
    """A line of the table: the runs of one label, one a seed.

    Attributes:
        label: what the results call it.
        runs: their results.
        marks: by metric, "+" or "-" where it is better or worse than the reference by more than chance.
    """

    label: str
    runs: Sequence[Mapping[str, Any]]
    marks: Mapping[str, str]

    @property
    def is_plm(self) -> bool:
        """Whether it is the PLM alone."""
        return bool(self.runs[0]["method"] == PLM)

    @property
    def title(self) -> str:
        """The label, with what dev data chose of the method's grid."""
        run = self.runs[0]
        return ", ".join(
            [self.label, *(f"{name}={run['settings'][name]}" for name in run["signature"]["config"]["grid"])]
        )

    def setting(self, name: str) -> Any:  # noqa: ANN401
        """The value of a setting, None where the method leaves it to its default; of `plm`, the PLM's parameters."""
        if name == PLM and name in self.runs[0]["settings"]:
            return self.runs[0]["signature"]["config"]["plm"]["parameters"]
        return self.runs[0]["settings"].get(name)

    def named_without(self, *names: str) -> str:
        """The label without these settings, be they given as `name=value` or by the value alone."""
        given = self.runs[0]["settings"]
        left_out = {form for name in names if name in given for form in (f"{name}={given[name]}", f"{given[name]}")}
        return ", ".join(part for part in self.label.split(", ") if part not in left_out)

    def values(self, measure: str) -> list[float]:
        """A metric, the dev perplexity or a cost, of every run; empty where a run lacks it."""
        values = []
        for run in self.runs:
            if measure == DEV:
                value = run[DEV]
            elif measure in (SECONDS, PARAMETERS):
                value = run["costs"][measure]
            else:
                value = run["scores"][measure]["value"]
            values.append(value)
        return [] if None in values else values

    def mean(self, measure: str) -> float | None:
        """Over seeds."""
        values = self.values(measure)
        return fmean(values) if values else None

    def spread(self, measure: str) -> float | None:
        """Standard deviation over seeds, None of a single one."""
        values = self.values(measure)
        return stdev(values) if len(values) > 1 else None


@dataclass(frozen=True)
class Results:
    """All of a study.

    Attributes:
        experiment: what its runs have in common.
        comparison: the comparison on the test examples.
        lines: in the table's order.
    """

    experiment: Mapping[str, Any]
    comparison: Mapping[str, Any]
    lines: Sequence[Line]

    @property
    def metrics(self) -> list[str]:
        """What every run was scored with, the leading one first."""
        return list(self.lines[0].runs[0]["scores"])


def read_results(file: Path) -> Results:
    """Read the file of a comparison or of a sweep."""
    fields = {name: value for line in read_lines(file) if RUN not in line for name, value in line.items()}
    experiment, comparison, runs = fields["experiment"], fields["comparison"], read_runs(file)
    marks: dict[str, dict[str, str]] = {}
    for (label, metric), difference in by_reference(comparison).get(experiment["reference"], {}).items():
        if difference["significant"]:
            marks.setdefault(label, {})[metric] = "+" if difference["difference"] > 0 else "-"
    lines = [
        Line(label, [runs[name] for name in names], marks.get(label, {}))
        for label, names in comparison["signature"]["config"]["runs"].items()
    ]
    return Results(experiment, comparison, lines)
