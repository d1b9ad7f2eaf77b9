"""The study of Gradual Unrolling: its table and its plot."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from reproduction.paths import RESULTS

FILE = RESULTS / "unrolling.jsonl"
COMMAND = "python -m reproduction.experiments.unrolling DATA PLM"
PAPER = 0.9
METRICS = {"records": ("bleu", "chrf", "slot_errors"), "simplification": ("sari", "bleu", "chrf")}


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


def tested(line: Mapping[str, Any]) -> list[Point]:
    """Return the schedules whose test scores are reported: the PLM alone, the paper's, and those that dev chooses."""
    points = [Point("none"), Point("square", PAPER), chosen(line, "square"), chosen(line, "linear", "constant")]
    return list(dict.fromkeys(points))


def name_of(kind: str, contexts: str, preset: str, seed: int) -> str:
    """Return the name of an adapter's run."""
    return f"{kind}-{contexts}-{preset}-seed{seed}"
