"""The results of an experiment on the disk: one file a run, and what a comparison of them says."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pema.console import note
from pema.errors import MismatchError
from pema.evaluation.elsewhere import ScoredElsewhere
from pema.evaluation.evaluate import get_metric
from pema.evaluation.score import Metric
from pema.evaluation.significance import SAMPLES, SEED, compare_means
from pema.experiments.experiment import Experiment
from pema.experiments.fields import SIGNATURE, require
from pema.experiments.layout import COMET, COMPARISON, EXPERIMENT, TEST
from pema.files import read_json, write_json, writing
from pema.signature import signature
from pema.tasks.readers import read_lines

SIGNIFICANT = 0.05


def slug(text: str) -> str:
    """`text` as the name of a file."""
    return re.sub(r"[^a-z0-9.=+]+", "-", text.lower()).strip("-")


def finished(file: Path, config: Mapping[str, Any]) -> dict[str, Any] | None:
    """The result in `file`, None where there is none.

    Raises:
        MismatchError: it was made with other settings; the message names the first that differs.
    """
    if not file.exists():
        return None
    result = require(read_json(file), file, SIGNATURE)
    before, now = result["signature"]["config"], json.loads(json.dumps(config))
    for key in (*now, *(key for key in before if key not in now)):
        if before.get(key) != now.get(key):
            raise MismatchError(
                f"{file} was made with another {key}: {before.get(key)!r}, not {now.get(key)!r}. Remove it to run it "
                "again, or give the method another label."
            )
    return result


def write_experiment(folder: Path, experiment: Experiment, labels: Sequence[str], plm: Mapping[str, Any]) -> None:
    """Write what all runs have in common, and the test examples."""
    data = experiment.data
    axes: dict[str, list[Any]] = {}
    if experiment.kind == "sweep":
        for entry in experiment.entries:
            for name, values in entry.grid.items():
                axes[name] = [*axes.get(name, []), *(value for value in values if value not in axes.get(name, []))]
    common = {
        "name": experiment.name,
        "title": experiment.title,
        "kind": experiment.kind,
        "task": experiment.task.name,
        "template": experiment.task.template.text,
        "data": {
            "name": data.name,
            "sha256": data.digest(),
            **{part: len(getattr(data, part)) for part in ("train", "dev", "test")},
        },
        "plm": dict(plm),
        "seeds": list(experiment.seeds),
        "metrics": list(experiment.metrics),
        "reference": experiment.references[0] if experiment.references else None,
        "methods": list(labels),
        "axes": axes,
        "budget": asdict(experiment.budget),
    }
    write_json(folder / EXPERIMENT, common | {"signature": signature(common, None)})
    with writing(folder / TEST) as temporary:
        lines = (json.dumps({"source": e.source, "target": e.target}, ensure_ascii=False) for e in data.test)
        temporary.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def write_comparison(folder: Path, experiment: Experiment, runs: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """Compare the runs of every label on the test examples, and write what was found.

    Args:
        folder: of the results.
        experiment: its metrics and references.
        runs: names of each label's runs, in the order of the table.
    """
    data = experiment.data
    references = [example.target for example in data.test]
    systems = {label: [read_lines(folder / f"{name}.txt") for name in names] for label, names in runs.items()}
    rows: dict[str, dict[str, Any]] = {
        label: {"label": label, "seeds": len(names), "metrics": {}} for label, names in runs.items()
    }
    sources = [example.source for example in data.test]
    metrics = {name: get_metric(name, data.annotated.get("test"), sources=sources) for name in experiment.metrics}
    metrics |= _comet(folder, [name for names in runs.values() for name in names])
    differences = []
    for name, metric in metrics.items():
        intervals, found = compare_means(metric, systems, references, experiment.references)
        for label, interval in intervals.items():
            rows[label]["metrics"][name] = asdict(interval)
        for (label, reference), difference in found.items():
            differences.append(
                {"label": label, "reference": reference, "metric": name}
                | asdict(difference)
                | {"significant": difference.p_value < SIGNIFICANT}
            )
    config = {
        "runs": {label: list(names) for label, names in runs.items()},
        "resampling": f"paired bootstrap of means over seeds|samples:{SAMPLES}|seed:{SEED}|p:two-sided|interval:95%",
        "significant": SIGNIFICANT,
    }
    comparison = {"rows": list(rows.values()), "differences": differences, "signature": signature(config, SEED)}
    write_json(folder / COMPARISON, comparison)
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
    metric = ScoredElsewhere(files)
    return {metric.name: metric}
