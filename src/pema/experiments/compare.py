"""Comparisons and sweeps: run what is missing, one result file per run, and compare on the test examples."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path
from typing import Any

from pema.console import keeping, note, progress
from pema.errors import MismatchError, PemaError
from pema.evaluation.evaluate import LABEL_ACCURACY, evaluate
from pema.evaluation.notation import metric_name, score_text
from pema.experiments.choice import best, trials
from pema.experiments.comparison import Comparisons
from pema.experiments.description import ExperimentFile
from pema.experiments.experiment import CPU, Experiment, Line, build_method
from pema.experiments.layout import run_name
from pema.experiments.records import Comparison, Costs, Needs, Point, Run, Score, Signature
from pema.experiments.results import finished, write_experiment
from pema.experiments.texts import write_texts
from pema.experiments.workplace import Workplace
from pema.files import write_json
from pema.locks import exclusive
from pema.methods.contract import TrainingReport
from pema.methods.registry import method_name
from pema.signature import signature

WARM_UP = 2
"""Number of outputs generated before time is measured: the first call of a process loads and allocates."""

USUAL = {"device": CPU, "batch_tokens": ExperimentFile.batch_tokens, "batch_size": ExperimentFile.batch_size}
"""Values of settings that results omit."""

COSTS = ("prepare_seconds", "trainable_parameters", "train_peak_bytes", "train_peak_accelerator_bytes")


def run_experiment(experiment: Experiment, results: Path, work: Path) -> Comparison:
    """Run the missing runs of a comparison or of a sweep, and compare.

    The comparison of the finished runs is also written between runs, and when a run fails or is interrupted.

    Args:
        experiment: what to run.
        results: parent of the results folder, which has the experiment's name and contains one file per run.
        work: folder of memories, trained adapters and models; existing ones are reused.

    Returns:
        The comparison on the test examples, as stored in `comparison.json`.

    Raises:
        PemaError: a run failed; finished runs are kept, and the same call continues from there.
        ConfigError: a line requires more of its PLM than this provides.
        MismatchError: the file of a run contains a result of other settings.
        DataError: the result of a run is damaged.
        StorageError: another process runs the same experiment.
    """
    folder = results / experiment.name
    workplace = Workplace(work, experiment)
    kept = f"finished runs are kept in {folder}, finished memories and trainings in {work}: the same command continues"
    with exclusive(folder), keeping(kept):
        todo = unfinished(experiment, workplace, folder)
        write_experiment(folder, experiment, workplace.plm({}).description.to_dict())
        comparisons = Comparisons(folder, experiment)
        runs: dict[str, list[str]] = {}
        try:
            planned = experiment.runs()
            with progress(experiment.title, len(planned), "runs") as advance:
                for line, seed in planned:
                    name = run_name(line.label, seed)
                    advance(0, note=name)
                    if name in todo:
                        _run(experiment, workplace, line, seed, folder / f"{name}.json")
                    runs.setdefault(line.label, []).append(name)
                    if name in todo:
                        comparisons.update(runs)
                    advance(1, note=name)
        except BaseException:
            if runs:
                with contextlib.suppress(PemaError):  # the failure of the run is the one to report
                    comparisons.write(runs)
            raise
        return comparisons.write(runs, complete=True)


def unfinished(experiment: Experiment, workplace: Workplace, folder: Path) -> set[str]:
    """Return the names of the runs that have no result yet; check those that have one, and what all require.

    Raises:
        ConfigError: a line requires more of its PLM than this provides.
        DataError: an example is too long for a PLM.
        MismatchError: the file of a run contains a result of other settings.
        DataError: the result of a run is damaged.
    """
    workplace.require_all()
    names, others = set(), dict[str, MismatchError]()
    for line, seed in experiment.runs():
        name = run_name(line.label, seed)
        file = folder / f"{name}.json"
        try:
            if not (file.exists() and finished(file, _config(experiment, workplace, line))):
                names.add(name)
        except MismatchError as error:
            others[name] = error
    if others:
        first, *further = others
        rest = f" The same holds for {', '.join(further)}; another `name` in the file keeps all." if further else ""
        raise MismatchError(f"{others[first]}{rest}")
    return names


def _config(experiment: Experiment, workplace: Workplace, line: Line) -> dict[str, Any]:
    """Return everything that the result of a run depends on, except its seed."""
    config: dict[str, Any] = {
        "experiment": experiment.name,
        "kind": experiment.kind,
        "method": method_name(line.method),
        "settings": dict(line.settings),
        "grid": {name: list(values) for name, values in line.choice.items()},
        "budget": vars(experiment.budget),
        "decoding": workplace.decoding(line.settings),
        "plm": workplace.plm(line.settings).description.to_dict(),
        "plm_dtype": experiment.plm_dtype,
        **experiment.task.template.record(workplace.plm(line.settings).tokenizer),
        "metrics": list(experiment.metrics),
        "data": experiment.data.name,
        "data_sha256": experiment.data.digest(),
    }
    implied = [build_method(line.method, each).implied for each in line.candidates()]
    if any(implied):
        config["implied"] = [dict(each) for each in implied]
    if LABEL_ACCURACY in experiment.metrics:
        config["labels"] = list(experiment.data.choices)
    if owner := workplace.owner(line.settings):
        config["owner"] = owner
    sources = experiment.own_sources(line)
    if sources:
        config["own"] = sources
    if experiment.generates_on_dev(line):
        config |= {"choose_by": experiment.choice_metric, "choose_texts": len(experiment.choice_numbers)}
    # Only if they differ from what earlier versions always used, so that their results stay valid.
    for name, usual in USUAL.items():
        if getattr(experiment, name) != usual:
            config[name] = getattr(experiment, name)
    return config


def _run(experiment: Experiment, workplace: Workplace, line: Line, seed: int, file: Path) -> None:
    """Run one setting with one seed, and write its result."""
    config = _config(experiment, workplace, line)
    tried = trials(experiment, workplace, line)
    settings = best(tried, experiment.choice_metric).settings if tried else line.settings
    stages, plm = workplace.stages(line.method, settings, seed), workplace.plm(settings)
    figures = workplace.figures(stages, plm)
    test = experiment.data.test
    with workplace.open(stages, plm) as adapted:
        adapted.generate(test[:WARM_UP], batch_size=experiment.batch_size)
        started = time.perf_counter()
        generated = adapted.generate(test, batch_size=experiment.batch_size)
        seconds = time.perf_counter() - started
        labels = workplace.labels(adapted, test) if LABEL_ACCURACY in experiment.metrics else None
        disk_bytes, chosen = adapted.disk_bytes, dict(adapted.chosen)
        perplexity = workplace.dev_perplexity(stages, plm, adapted)
    scores = evaluate(
        experiment.task,
        generated.texts,
        [example.references for example in test],
        sources=[example.source for example in test],
        annotated=experiment.data.annotated.get("test"),
        metrics=experiment.metrics,
        chosen=labels,
    )
    result = Run(
        run=file.stem,
        label=line.label,
        method=method_name(line.method),
        settings=dict(settings),
        seed=seed,
        scores={name: Score(**vars(score)) for name, score in scores.items()},
        dev_perplexity=perplexity,
        trials=tuple(tried),
        chosen=chosen,
        costs=Costs(
            **{name: figures.get(name) for name in COSTS},
            train_seconds=figures["seconds"],
            seconds_per_token=seconds / max(1, generated.tokens),
            generated_tokens=generated.tokens,
            cut_texts=generated.cut,
            disk_bytes=disk_bytes,
        ),
        needs=Needs(**vars(stages.method.needs)),
        curve=tuple(Point(**point) for point in figures["curve"]),
        signature=Signature(**signature(config, seed)),
        training_helped=TrainingReport.from_dict(figures).helped,
    )
    write_texts(file.parent, file.stem, generated.texts, labels)
    write_json(file, result.to_dict())
    values = ", ".join(f"{metric_name(name)} {score_text(name, each.value)}" for name, each in scores.items())
    if generated.cut:
        limit = workplace.decoding(settings)["max_new_tokens"]
        values += f", {generated.cut:,} of {len(test):,} texts cut at {limit:,} tokens"
    note(f"{file.stem}: {values}" + (", but training did not help" if result.training_helped is False else ""))
