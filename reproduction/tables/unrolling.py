"""The study of Gradual Unrolling: its table and its plot."""

from __future__ import annotations

from dataclasses import dataclass

from reproduction.paths import RESULTS

FILE = RESULTS / "unrolling.jsonl"
COMMAND = "python -m reproduction.experiments.unrolling DATA PLM"
LAMBDAS = (0.3, 0.5, 0.7, 0.9, 1.0)
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


def name_of(kind: str, contexts: str, preset: str, seed: int) -> str:
    """Return the name of an adapter's run."""
    return f"{kind}-{contexts}-{preset}-seed{seed}"
