"""The comparison of the finished runs of an experiment on the test examples."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Literal

from pema.console import note
from pema.evaluation.elsewhere import ExternalScores
from pema.evaluation.evaluate import LABEL_ACCURACY, get_metric
from pema.evaluation.score import Array, Metric, Reference, Selective
from pema.evaluation.significance import SAMPLES, SEED, compare_means
from pema.experiments.experiment import PLM, Experiment
from pema.experiments.layout import COMET, COMPARISON
from pema.experiments.reader import read_run
from pema.experiments.records import Comparison, Difference, Interval, NoHelp, Row, Signature
from pema.experiments.texts import read_labels, read_texts
from pema.files import digest, write_json
from pema.methods.plm_alone import PLMAlone
from pema.signature import signature

SIGNIFICANT = 0.05
"""Upper limit of the p-value of a significant difference, exclusive."""

SHARE = 0.05
"""Maximum share of the time for comparisons between runs."""

RESAMPLING = f"paired bootstrap of means over seeds|samples:{SAMPLES}|seed:{SEED}|p:two-sided|interval:95%"


class Comparisons:
    """Comparisons of a growing number of finished runs on the test examples."""

    def __init__(self, folder: Path, experiment: Experiment) -> None:
        """Prepare the metrics; `folder` is the folder of the results."""
        data = experiment.data
        self._folder, self._experiment = folder, experiment
        self._sources = [example.source for example in data.test]
        self._references = [example.references for example in data.test]
        annotated = data.annotated.get("test")
        self._metrics: dict[str, Metric] = {
            name: _Remembered(get_metric(name, annotated, sources=self._sources), len(data.test))
            for name in experiment.metrics
        }
        self._texts: dict[str, list[str]] = {}
        self._written, self._seconds = time.perf_counter(), 0.0

    def update(self, runs: Mapping[str, Sequence[str]]) -> None:
        """Write the comparison of these runs, unless that would take more than a small share of the time."""
        if time.perf_counter() - self._written >= self._seconds / SHARE:
            self.write(runs)

    def write(self, runs: Mapping[str, Sequence[str]], *, complete: bool = False) -> Comparison:
        """Compare runs and write the result.

        Args:
            runs: names of each label's finished runs, in the order of the table.
            complete: whether these are all planned runs; only then scores from another environment are included.
        """
        started = time.perf_counter()
        systems = {label: [self._read(name) for name in names] for label, names in runs.items()}
        against = [label for label in self._experiment.references if label in systems]
        metrics = dict(self._metrics)
        if complete:
            metrics |= _comet(self._folder, [name for names in runs.values() for name in names])
        intervals: dict[str, dict[str, Interval]] = {label: {} for label in runs}
        differences = []
        for name, metric in metrics.items():
            outputs = systems
            if name == LABEL_ACCURACY:
                outputs = {label: [read_labels(self._folder, run) for run in names] for label, names in runs.items()}
            means, gaps = compare_means(metric, outputs, self._references, against)
            for label, interval in means.items():
                intervals[label][name] = Interval(**asdict(interval))
            differences += [
                Difference(
                    label=label,
                    reference=reference,
                    metric=name,
                    **asdict(gap),
                    significant=gap.p_value < SIGNIFICANT,
                )
                for (label, reference), gap in gaps.items()
            ]
        config = {
            "runs": {label: list(names) for label, names in runs.items()},
            "resampling": RESAMPLING,
            "significant": SIGNIFICANT,
        }
        no_help = self._no_help(runs)
        comparison = Comparison(
            rows=tuple(
                Row(label=label, seeds=len(runs[label]), metrics=values, no_help=no_help[label] or None)
                for label, values in intervals.items()
            ),
            differences=tuple(differences),
            signature=Signature(**signature(config, SEED)),
        )
        write_json(self._folder / COMPARISON, comparison.to_dict())
        self._written = time.perf_counter()
        self._seconds = self._written - started
        return comparison

    def _read(self, run: str) -> list[str]:
        if run not in self._texts:
            self._texts[run] = read_texts(self._folder, run)
        return self._texts[run]

    def _no_help(self, runs: Mapping[str, Sequence[str]]) -> dict[str, tuple[NoHelp, ...]]:
        """Return the runs of each label whose training did not help, with the reason."""
        lines = {line.label: line for line in self._experiment.lines()}
        plm_of = {label: lines[label].settings.get(PLM, self._experiment.plm) for label in runs}
        alone = {plm_of[label]: label for label in runs if lines[label].method is PLMAlone}
        unhelped: dict[str, tuple[NoHelp, ...]] = {}
        for label, names in runs.items():
            flags: dict[str, Literal["step 0", "same texts"]] = {}
            plm = alone.get(plm_of[label])
            for name in names:
                if read_run(self._folder / f"{name}.json").training_helped is False:
                    flags[name] = "step 0"
                elif plm not in (None, label) and self._read(name) == self._read(runs[plm][0]):
                    flags[name] = "same texts"
            unhelped[label] = tuple(NoHelp(run=name, reason=reason) for name, reason in flags.items())
        return unhelped


class _Remembered:
    """Metric that computes the statistics of the same texts once."""

    def __init__(self, metric: Metric, count: int) -> None:
        self._metric, self._count = metric, count
        self._statistics: dict[str, Array] = {}

    def statistics(self, hypotheses: Sequence[str], references: Sequence[Reference]) -> Array:
        key = digest({"hypotheses": list(hypotheses), "references": list(references)})
        if key not in self._statistics:
            self._statistics[key] = self._metric.statistics(hypotheses, references)
        return self._statistics[key]

    def value(self, totals: Array) -> float:
        return self._metric.value(totals)

    def signature(self, totals: Array) -> str:
        return self._metric.signature(totals)

    def texts(self, totals: Array) -> int:
        return self._metric.texts(totals) if isinstance(self._metric, Selective) else self._count


def _comet(folder: Path, runs: Sequence[str]) -> dict[str, Metric]:
    """Read the scores of `reproduction/comet_score.py` from the folder `comet`; empty unless it scored every run."""
    files = [folder / COMET / f"{name}.json" for name in runs]
    missing = [file.name for file in files if not file.exists()]
    if len(missing) == len(files):
        return {}
    if missing:
        note(f"{folder / COMET} lacks {', '.join(missing)}: its scores are left out of the comparison.")
        return {}
    metric = ExternalScores(files)
    return {metric.name: metric}
