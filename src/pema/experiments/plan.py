"""The plan of a comparison or a sweep: its runs, trainings, time and memory, before any is started."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import NamedTuple

from pema.evaluation.evaluate import LABEL_ACCURACY
from pema.evaluation.notation import NOTHING
from pema.experiments.compare import unfinished
from pema.experiments.estimate import (
    Sizes,
    Speed,
    memory_bytes,
    prepare_seconds,
    run_seconds,
    text_seconds,
    train_seconds,
)
from pema.experiments.experiment import Experiment, Line
from pema.experiments.formats import seconds, size
from pema.experiments.layout import run_name
from pema.experiments.tables import Cell, Table
from pema.experiments.training_process import TRAINED
from pema.experiments.workplace import PREPARED, Stages, Workplace
from pema.owner.contract import PLM


@dataclass(frozen=True)
class LinePlan:
    """Remaining work for a line of the table.

    Attributes:
        label: label of the line.
        finished: number of finished runs, which would be skipped.
        runs: number of remaining runs.
        preparations: number of memories or emulators to build, without those of previous lines.
        trainings: maximum number of remaining trainings.
        seconds: estimated maximum time.
        memory_bytes: estimated memory of the PLM and the training process; 0 if there is nothing to do.
    """

    label: str
    finished: int
    runs: int
    preparations: int
    trainings: int
    seconds: float
    memory_bytes: int


def plan_experiment(experiment: Experiment, results: Path, work: Path) -> list[LinePlan]:
    """Return the remaining work of `run_experiment`; the PLM is loaded and measured, and nothing is written.

    Raises:
        MismatchError, DataError: see `run_experiment`.
        OwnerError: the PLM cannot be loaded.
    """
    workplace = Workplace(work, experiment)
    todo = unfinished(experiment, workplace, results / experiment.name)
    planned: set[Path] = set()
    measured: dict[str, _Measured] = {}
    return [_line(experiment, workplace, line, todo, planned, measured) for line in experiment.lines()]


class _Measured(NamedTuple):
    """The speed of a PLM, and the number of tokens that the data have with its tokenizer."""

    speed: Speed
    train: Sizes
    dev: Sizes
    test: Sizes
    choice: Sizes

    @classmethod
    def of(cls, plm: PLM, experiment: Experiment, stages: Stages) -> _Measured:
        # One text is generated per test example, however many references it has.
        test = [replace(each, alternatives=()) for each in experiment.data.test]
        choice = [replace(experiment.data.dev[i], alternatives=()) for i in experiment.choice_numbers]
        parts = (stages.job.train, experiment.data.dev, test, choice)
        return cls(Speed.of(plm, stages, experiment.batch_size), *(Sizes.of(plm, stages, part) for part in parts))


def _line(
    experiment: Experiment,
    workplace: Workplace,
    line: Line,
    todo: set[str],
    planned: set[Path],
    measured: dict[str, _Measured],
) -> LinePlan:
    seeds = experiment.seeds_of(line)
    left = [seed for seed in seeds if run_name(line.label, seed) in todo]
    if not left:
        return LinePlan(line.label, len(seeds), 0, 0, 0, 0.0, 0)
    plm = workplace.plm(line.settings)
    candidates = list(line.candidates())
    # The chosen candidate is not known yet: all with the first seed, then any one with the other seeds.
    stages = [workplace.stages(line.method, each, experiment.seeds[0]) for each in candidates]
    stages += [workplace.stages(line.method, candidates[0], seed) for seed in left if seed != experiment.seeds[0]]
    batch_size = experiment.batch_size
    name = stages[0].job.plm
    if name not in measured:
        measured[name] = _Measured.of(plm, experiment, stages[0])
    speed, train, dev, test, choice = measured[name]
    preparations = _new(stages, "prepared", PREPARED, planned)
    trainings = _new(stages, "trained", TRAINED, planned)
    total = len(left) * run_seconds(speed, test, dev, batch_size)
    if LABEL_ACCURACY in experiment.metrics:  # choosing labels takes about as long as generating texts
        total += len(left) * text_seconds(speed, test, batch_size)
    total += sum(prepare_seconds(each, speed, train, batch_size) for each in preparations)
    total += sum(train_seconds(each, speed, train, plm.description.vocabulary_size) for each in trainings)
    if experiment.generates_on_dev(line):
        silent = [each for each in stages[: len(candidates)] if not workplace.dev_texts_file(each).exists()]
        total += len(silent) * text_seconds(speed, choice, batch_size)
    return LinePlan(
        line.label,
        len(seeds) - len(left),
        len(left),
        len(preparations),
        len(trainings),
        round(total, 1),
        max(memory_bytes(each, plm, train) for each in stages),
    )


def _new(stages: list[Stages], stage: str, mark: str, planned: set[Path]) -> list[Stages]:
    """Return the runs whose stage is neither finished nor planned yet, and add their folders to the planned ones."""
    new = []
    for each in stages:
        folder: Path = getattr(each, stage)
        if stage == "prepared" and each.method.prepared_by is None:
            continue
        if folder not in planned and not (folder / mark).exists():
            planned.add(folder)
            new.append(each)
    return new


def plan_table(experiment: Experiment, lines: list[LinePlan]) -> Table:
    """Return the plan as a table with a line of totals."""
    heads = ("", "Finished", "Runs", "To prepare", "Trainings", "Time", "Memory")
    rows = [tuple(map(Cell, _texts(line))) for line in lines]
    totals = {
        field.name: sum(getattr(line, field.name) for line in lines)
        for field in fields(LinePlan)
        if field.name not in ("label", "memory_bytes")
    }
    memory = max(line.memory_bytes for line in lines)
    rows.append(tuple(map(Cell, _texts(LinePlan(label="all", memory_bytes=memory, **totals)))))
    notes = (
        "Estimated from a measured forward pass; trainings and their time are upper bounds (early stopping); memory is "
        "that of the PLM in this process and of the training process, without libraries. No run was started.",
    )
    return Table(f"{experiment.title}: plan", heads, tuple(rows), notes)


def _texts(line: LinePlan) -> list[str]:
    counts = [f"{value:,}" for value in (line.finished, line.runs, line.preparations, line.trainings)]
    costs = [seconds(line.seconds), size(line.memory_bytes)] if line.runs else [NOTHING, NOTHING]
    return [line.label, *counts, *costs]
