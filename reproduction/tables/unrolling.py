"""The study of Gradual Unrolling: its tables and texts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

from pema.evaluation.choice import rank
from pema.evaluation.notation import NOTHING, metric_name, score_text
from pema.experiments.records import Trial
from reproduction.lines import files, read_runs
from reproduction.paths import DOCS, RESULTS
from reproduction.tables.markdown import head, row, signature_of, source
from reproduction.tables.results import lines_of, read_results

FILE, PAGE = RESULTS / "unrolling.jsonl", DOCS / "studies" / "gradual-unrolling.md"
COMMAND = "python -m reproduction.experiments.unrolling DATA PLM"
PAPER = 0.9
METRICS = {"records": ("bleu", "chrf", "slot_errors"), "simplification": ("sari", "bleu", "chrf")}
TITLES = {
    "records": "Records of restaurants to texts (E2E NLG)",
    "simplification": "Sentences to simpler ones (ASSET)",
}
COURSES = {"none": "PLM alone", "square": "Gradual Unrolling", "linear": "linear", "constant": "constant"}
ADAPTERS = tuple((contexts, preset) for contexts in ("teacher", "predicted") for preset in ("best", "paper"))
PERPLEXITY = "perplexity"

Run = Mapping[str, Any]
LENGTHS = {
    "4 input": "four times the input",
    "target": "the reference",
    "mean target": "mean training target",
}
SAMPLES = 3
SHOWN = ("none", "square 0.9", "linear 0.9", "constant 0.7")


@dataclass(frozen=True)
class Point:
    """A schedule of the study.

    Attributes:
        course: square (Gradual Unrolling), linear, constant, fitted or none.
        lambda_max: the weight at t = 0, of square before the square.
        length: what SL is: the input's length, or a multiple of it, the target's, or the training targets' mean.
    """

    course: str
    lambda_max: float = 0.0
    length: str = "input"

    @property
    def key(self) -> str:
        """Name of the schedule in results."""
        if self.course in ("none", "fitted"):
            return self.course
        return f"{self.course} {self.lambda_max}" + ("" if self.length == "input" else f", SL {self.length}")

    @classmethod
    def of(cls, key: str) -> Point:
        """Return the schedule of a name in results."""
        course, _, rest = key.partition(" ")
        value, _, length = rest.partition(", SL ")
        return cls(course, float(value or 0.0), length or "input")


def chosen(line: Mapping[str, Any], *courses: str) -> Point:
    """Return the schedule of these courses with the best score on dev by the main metric of the task."""
    main = METRICS[line["task"]][0]
    # What needs the length of the reference is not available when texts are generated.
    possible = {
        point: scores[main]
        for point, scores in ((Point.of(key), scores) for key, scores in line["dev"].items())
        if point.course in courses and point.length != "target"
    }
    return max(possible, key=lambda point: possible[point])


def reported(line: Mapping[str, Any]) -> list[Point]:
    """Return the schedules whose test scores are reported: the PLM alone, the paper's, and those that dev chooses."""
    points = [Point("none"), Point("square", PAPER), chosen(line, "square"), chosen(line, "linear", "constant")]
    return list(dict.fromkeys(points))


def name_of(kind: str, contexts: str, preset: str, seed: int) -> str:
    """Return the name of an adapter's run."""
    return f"{kind}-{contexts}-{preset}-seed{seed}"


def unrolling() -> str:
    """Return the tables of the comparisons and of the study, and the first texts."""
    runs = list(read_runs(FILE).values())
    tasks = [kind for kind in TITLES if any(run["task"] == kind for run in runs)]
    text = "".join(_task(kind, [run for run in runs if run["task"] == kind]) for kind in tasks)
    return text + _samples(runs) + source(signature_of(runs[0]), COMMAND) + "\n" + _comparisons()


def _comparisons() -> str:
    """Return the choice of every comparison that had both schedules as candidates; "" if there is none."""
    rows = ""
    for file in files(RESULTS / "compare"):
        for line in lines_of(read_results(file)):
            run = line.runs[0]
            metric = run.signature.config.get("choose_by")
            constant, gradual = (_best_of(course, run.trials, metric) for course in ("constant", "unrolling"))
            if metric is None or constant is None or gradual is None:
                continue
            likely = min(run.trials, key=lambda trial: trial.dev_perplexity or math.inf)
            cells = [_trial(trial, metric) for trial in (constant, gradual, likely)]
            cells[2] = f"{likely.settings['schedule']}, {cells[2]}"
            rows += row([line.results.about.title, line.label, metric_name(metric), *cells])
    if not rows:
        return ""
    text = "### Comparisons\n\nThe score on dev of the best lambda_max (in brackets) of each schedule, and of the "
    text += "candidate with the lowest perplexity.\n\n"
    return text + head(["comparison", "method", "on dev", "constant", "Gradual Unrolling", "lowest perplexity"]) + rows


def _best_of(course: str, trials: Sequence[Trial], metric: str | None) -> Trial | None:
    """Return the trial with the best score among those with a schedule; None if there is none."""
    some = [trial for trial in trials if trial.settings.get("schedule") == course]
    return None if metric is None else min(some, key=lambda trial: rank(metric, trial.dev_score), default=None)


def _trial(trial: Trial, metric: str) -> str:
    return f"{score_text(metric, trial.dev_score)} ({trial.settings.get('lambda_max', 'default')})"


def _task(kind: str, runs: Sequence[Run]) -> str:
    """Return the tables of a task."""
    first = next(run for run in runs if run["preset"] == "best" and run["contexts"] == "teacher" and not run["seed"])
    measured = [key for key in ADAPTERS if _of(runs, *key)]
    main, *others = METRICS[kind]
    text = (
        f"### {TITLES[kind]}\n\n{first['examples']['dev']} dev examples. SL, the input, is {first['mean_input']:.0f} "
    )
    text += f"tokens long on average, a target {first['mean_target']:.0f}.\n\n"
    extra = [*others, PERPLEXITY]
    names = [f"{contexts}, `{preset}`: {metric_name(main)}" for contexts, preset in measured]
    names[1:1] = [metric_name(name) for name in extra]
    text += head(["schedule", *names])
    keys = dict.fromkeys(key for run in runs for key in run["dev"])
    for point in sorted(map(Point.of, keys), key=_order):
        cells = [_cell(_of(runs, *key), "dev", point, main) for key in measured]
        cells[1:1] = [_cell(_of(runs, *measured[0]), "dev", point, name) for name in extra]
        text += row([_title(point), *cells])
    tested = [key for key in measured if any(run["test"] for run in _of(runs, *key))]
    if tested:
        text += f"\nOn {first['examples']['test']} test examples, the paper's schedule and what dev data choose:\n\n"
        text += head(["contexts, preset", "schedule", *map(metric_name, METRICS[kind])])
    for contexts, preset in tested:
        (run,) = (run for run in _of(runs, contexts, preset) if run["test"])
        for key in run["test"]:
            cells = [_cell([run], "test", Point.of(key), name) for name in METRICS[kind]]
            text += row([f"{contexts}, `{preset}`", _title(Point.of(key)), *cells])
    return text + "\n"


def _of(runs: Sequence[Run], contexts: str, preset: str) -> list[Run]:
    return [run for run in runs if (run["contexts"], run["preset"]) == (contexts, preset)]


def _order(point: Point) -> tuple[int, str, float]:
    return [*COURSES, "fitted"].index(point.course), "" if point.length == "input" else point.length, point.lambda_max


def _title(point: Point) -> str:
    """Return a schedule in words."""
    if point.course in ("none", "fitted"):
        return COURSES.get(point.course, point.course)
    length = "" if point.length == "input" else f", SL: {LENGTHS[point.length]}"
    return f"{COURSES[point.course]} {point.lambda_max}{length}"


def _cell(runs: Sequence[Run], part: str, point: Point, name: str) -> str:
    """Return the mean of a score over seeds, with the standard deviation if there are several."""
    values = [scores[name] for run in runs if (scores := run[part].get(point.key)) and scores[name] is not None]
    if not values:
        return NOTHING
    mean = score_text(name, fmean(values))
    return mean if len(values) < 2 else f"{mean} ± {score_text(name, stdev(values))}"


def _samples(runs: Sequence[Run]) -> str:
    """Return the first texts about records, one schedule below the other."""
    first = next(run for run in runs if run["run"] == name_of("records", "teacher", "best", 0))
    text = "### Texts about the first dev records\n\n`teacher` contexts, preset `best`.\n"
    for number in range(SAMPLES):
        text += "\n" + head(["record", first["sources"][number]])
        for key in SHOWN:
            if key in first["dev"]:
                text += row([_title(Point.of(key)), " ".join(first["dev"][key]["texts"][number].split())])
    return text + "\n"
