"""Files of an experiment's results: one per run, and one of the facts common to all runs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pema.errors import MismatchError
from pema.experiments.experiment import Experiment
from pema.experiments.layout import EXPERIMENT, TEST, run_name
from pema.experiments.reader import read_run
from pema.experiments.records import DataFacts, ExperimentFacts, Signature
from pema.files import write_json
from pema.signature import signature
from pema.tasks.writer import write_examples


def finished(file: Path, config: Mapping[str, Any]) -> bool:
    """Return whether `file` contains the result of a run.

    Raises:
        MismatchError: it was run with other settings; the message names the first that differs.
        DataError: it is damaged, or another version wrote it.
    """
    if not file.exists():
        return False
    before = read_run(file, "Remove it to run it again.").signature.config
    now = json.loads(json.dumps(config))
    for key in (*now, *(key for key in before if key not in now)):
        if before.get(key) != now.get(key):
            name, old, new = _first_difference(key, before.get(key), now.get(key))
            raise MismatchError(
                f"{file} was run with another {name}: {old!r}, not {new!r}. Remove it to run it again, or give the "
                "method another label."
            )
    return True


def _first_difference(name: str, old: Any, new: Any) -> tuple[str, Any, Any]:  # noqa: ANN401
    """Return the first innermost values that differ, and their name; None stands for a value that is missing."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        key = next(key for key in (*new, *old) if old.get(key) != new.get(key))
        return _first_difference(f"{name}.{key}", old.get(key), new.get(key))
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        place = next(i for i in range(len(new)) if old[i] != new[i])
        return _first_difference(f"{name}[{place}]", old[place], new[place])
    return name, old, new


def write_experiment(folder: Path, experiment: Experiment, plm: Mapping[str, Any]) -> None:
    """Write the facts common to all runs, with the names of the planned runs, and the test examples."""
    data = experiment.data
    runs: dict[str, list[str]] = {}
    for line, seed in experiment.runs():
        runs.setdefault(line.label, []).append(run_name(line.label, seed))
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
        "methods": tuple(runs),
        "axes": axes,
        "budget": asdict(experiment.budget),
    }
    parts = {part: len(getattr(data, part)) for part in ("train", "dev", "test")}
    facts = DataFacts(name=data.name, sha256=data.digest(), **parts)
    config = common | {"data": facts.to_dict()}
    about = ExperimentFacts(**common, data=facts, runs=runs, signature=Signature(**signature(config, None)))
    write_json(folder / EXPERIMENT, about.to_dict())
    write_examples(folder / TEST, data.test)
