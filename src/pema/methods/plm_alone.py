"""The unadapted PLM, prompted with the task's template: the baseline of all adaptations."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from pema.methods.contract import AdaptedModel, Job, Method, Needs, Requirement, TrainingReport

if TYPE_CHECKING:
    from pema.owner.contract import PLM


@dataclass(frozen=True)
class PLMAlone(Method):
    """The PLM alone: P(y | c) = P_LM(y | c)."""

    name: ClassVar[str] = "plm"
    seeded: ClassVar[bool] = False

    @property
    def needs(self) -> Needs:
        """Nothing."""
        return Needs("none", targets_at_owner=False, gradients=False)

    @property
    def requires(self) -> frozenset[Requirement]:
        """Greedy texts only."""
        return frozenset()

    def train(self, job: Job, prepared: Path, output: Path) -> TrainingReport:
        """Return an empty report; there is nothing to train."""
        return TrainingReport(0, 0.0)

    def open(self, plm: PLM, job: Job, prepared: Path, trained: Path) -> AdaptedModel:
        """See `Method.open`."""
        from pema.methods.adapted.plain import Plain

        return Plain(plm, job)
