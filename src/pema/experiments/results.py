"""The results of an experiment on the disk: one file a run, and what a comparison of them says."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pema.console import note
from pema.errors import MismatchError
from pema.evaluation.elsewhere import ExternalScores
from pema.evaluation.evaluate import get_metric
from pema.evaluation.score import Metric
from pema.evaluation.significance import SAMPLES, SEED, compare_means
from pema.experiments.experiment import Experiment
from pema.experiments.layout import COMET, COMPARISON, EXPERIMENT, TEST
from pema.experiments.reader import read_run
from pema.experiments.records import Comparison, DataFacts, Difference, ExperimentFacts, Interval, Row, Signature
from pema.files import write_json, writing
from pema.signature import signature
from pema.tasks.readers import read_lines

SIGNIFICANT = 0.05


def finished(file: Path, config: Mapping[str, Any]) -> bool:
    """Whether `file` holds the result of a run.

    Raises:
        MismatchError: it was made with other settings; the message names the first that differs.
        DataError: it is damaged, or another version wrote it.
    """
    if not file.exists():
        return False
    before = read_run(file, "Remove it to run it again.").signature.config
    now = json.loads(json.dumps(config))
    for key in (*now, *(key for key in before if key not in now)):
        if before.get(key) != now.get(key):
            raise MismatchError(
                f"{file} was made with another {key}: {before.get(key)!r}, not {now.get(key)!r}. Remove it to run it "
                "again, or give the method another label."
            )
    return True


def write_experiment(folder: Path, experiment: Experiment, labels: Sequence[str], plm: Mapping[str, Any]) -> None:
    """Write what all runs have in common, and the test examples."""
    data = experiment.data
    axes: dict[str, list[Any]] = {}
    if experiment.kind == "sweep":
        for entry in experiment.entries:
            for name, values in entry.grid.items():
                axes[name] = [*axes.get(name, []), *(value for value in values if value not in axes.get(name, []))]
    common: dict[str, Any] = {
        "name": experiment.name,
        "title": experiment.title,
        "kind": experiment.kind,
        "task": experiment.task.name,
        "template": experiment.task.template.text,
        "plm": dict(plm),
        "seeds": experiment.seeds,
        "metrics": experiment.metrics,
        "reference": experiment.references[0] if experiment.references else None,
        "methods": tuple(labels),
        "axes": axes,
        "budget": asdict(experiment.budget),
    }
    parts = {part: len(getattr(data, part)) for part in ("train", "dev", "test")}
    facts = DataFacts(name=data.name, sha256=data.digest(), **parts)
    config = common | {"data": facts.to_dict()}
    about = ExperimentFacts(**common, data=facts, signature=Signature(**signature(config, None)))
    write_json(folder / EXPERIMENT, about.to_dict())
    with writing(folder / TEST) as temporary:
        lines = (json.dumps({"source": e.source, "target": e.target}, ensure_ascii=False) for e in data.test)
        temporary.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def write_comparison(folder: Path, experiment: Experiment, runs: Mapping[str, Sequence[str]]) -> Comparison:
    """Compare the runs of every label on the test examples, and write what was found.

    Args:
        folder: of the results.
        experiment: its metrics and references.
        runs: names of each label's runs, in the order of the table.
    """
    data = experiment.data
    references = [example.target for example in data.test]
    systems = {label: [read_lines(folder / f"{name}.txt") for name in names] for label, names in runs.items()}
    rows: dict[str, dict[str, Interval]] = {label: {} for label in runs}
    sources = [example.source for example in data.test]
    metrics = {name: get_metric(name, data.annotated.get("test"), sources=sources) for name in experiment.metrics}
    metrics |= _comet(folder, [name for names in runs.values() for name in names])
    differences = []
    for name, metric in metrics.items():
        intervals, found = compare_means(metric, systems, references, experiment.references)
        for label, interval in intervals.items():
            rows[label][name] = Interval(**asdict(interval))
        for (label, reference), difference in found.items():
            significant = difference.p_value < SIGNIFICANT
            differences.append(
                Difference(label=label, reference=reference, metric=name, **asdict(difference), significant=significant)
            )
    config = {
        "runs": {label: list(names) for label, names in runs.items()},
        "resampling": f"paired bootstrap of means over seeds|samples:{SAMPLES}|seed:{SEED}|p:two-sided|interval:95%",
        "significant": SIGNIFICANT,
    }
    comparison = Comparison(
        rows=tuple(Row(label=label, seeds=len(runs[label]), metrics=metrics) for label, metrics in rows.items()),
        differences=tuple(differences),
        signature=Signature(**signature(config, SEED)),
    )
    write_json(folder / COMPARISON, comparison.to_dict())
    return comparison


def _comet(folder: Path, runs: Sequence[str]) -> dict[str, Metric]:
    """The scores that `reproduction/comet_score.py` left in the folder `comet`, where it scored every run."""
    files = [folder / COMET / f"{name}.json" for name in runs]
    missing = [file.name for file in files if not file.exists()]
    if len(missing) == len(files):
        return {}
    if missing:
        note(f"{folder / COMET} lacks {', '.join(missing)}: its scores are left out of the comparison.")
        return {}
    metric = ExternalScores(files)
    return {metric.name: metric}
