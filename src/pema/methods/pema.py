# ruff: noqa: RUF009  (`same` is `dataclasses.field` with what another dataclass declares)
"""PEMA as an adaptation method."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

from pema.adapter.config import TrainConfig
from pema.adapter.presets import preset
from pema.adapter.schedule import ScheduleName
from pema.errors import ConfigError
from pema.generation.config import GenerateConfig
from pema.memory.config import MOST_ROUNDS, require_rounds
from pema.methods.contract import AdaptedModel, Job, Requirement, TrainingReport
from pema.methods.on_memory import MEMORY, MemoryMethod
from pema.schema import among, option, same

if TYPE_CHECKING:
    from pema.owner.contract import PLM
    from pema.tasks.registry import Task

ADAPTER, LOG = "adapter", "training.jsonl"


@dataclass(frozen=True)
class PEMA(MemoryMethod):
    """PEMA: P = lambda_t P_PEMA + (1 - lambda_t) P_LM; the settings of `TrainConfig` are further settings.

    Attributes:
        preset: `paper`, `best`, `residual` or `private`.
        schedule: see `GenerateConfig`.
        lambda_max: see `GenerateConfig`.
        rounds: number of on-policy rounds; see `pema.generation.rounds`.
        changes: settings of the adapter's training that differ from the preset's.
    """

    name: ClassVar[str] = "pema"

    preset: str = "best"
    schedule: ScheduleName | None = same(GenerateConfig, "schedule")
    lambda_max: float | None = same(GenerateConfig, "lambda_max")
    rounds: int = option(
        0, "Further rounds, whose contexts follow the text that an adapter writes.", least=0, most=MOST_ROUNDS
    )
    changes: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        require_rounds(self.rounds, self.building(), preset(self.preset, **self.changes).dp_epsilon)

    @property
    def shared(self) -> bool:
        """Whether the memory depends on the PLM and the data only; that of rounds depends on trained adapters."""
        return not self.rounds

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> Self:
        """See `Method.of`; settings that are not fields are settings of the adapter's training."""
        own = {each.name for each in fields(cls)} - {"changes"}
        among("setting", settings, [*sorted(own), *(field.name for field in fields(TrainConfig))], cls.name)
        budgeted = {"seed", "patience", "dev_fraction"} & settings.keys()
        if budgeted:
            raise ConfigError(f"{sorted(budgeted)[0]} belongs to the budget or to the run, not to a method's settings.")
        changes = {name: value for name, value in settings.items() if name not in own}
        return cls(**{name: value for name, value in settings.items() if name in own}, changes=changes)

    def settings(self) -> dict[str, Any]:
        """Return JSON-ready values of all settings, including those of the training."""
        own = {each.name: getattr(self, each.name) for each in fields(self) if each.name != "changes"}
        if not self.rounds:  # results of earlier versions have none
            del own["rounds"]
        return own | dict(self.changes)

    def require_libraries(self) -> None:
        """See `Method.require_libraries`."""
        preset(self.preset, **self.changes).require_libraries()

    def require_suited(self, plm: PLM, task: Task) -> None:
        """See `Method.require_suited`."""
        preset(self.preset, **self.changes).require_suited(plm.description)

    @property
    def implied(self) -> Mapping[str, Any]:
        """All settings of the adapter's training."""
        return preset(self.preset, **self.changes).to_dict()

    @property
    def requires(self) -> frozenset[Requirement]:
        """The contexts of the memory; the texts of rounds are those of a mixture over all tokens."""
        return super().requires | ({"probabilities"} if self.rounds else set())

    @property
    def prepared_by(self) -> Mapping[str, Any]:
        """Settings of the memory, and of the adapters of the rounds."""
        rounds = {"rounds": self.rounds, "training": self.implied} if self.rounds else {}
        return {**super().prepared_by, **rounds}

    @property
    def trained_by(self) -> Mapping[str, Any]:
        """All settings except the schedule: the adapter does not depend on it."""
        return {"training": self.implied, **self.prepared_by}

    def config(self, job: Job) -> TrainConfig:
        """Return the settings of the adapter's training, within the budget."""
        wanted = preset(self.preset, **self.changes)
        budget = job.budget
        return replace(
            wanted,
            seed=job.seed,
            epochs=min(wanted.epochs, budget.epochs),
            patience=budget.patience,
            dev_fraction=budget.dev_fraction,
            device=wanted.device if "device" in self.changes else job.device,
        )

    def prepare(self, plm: PLM, job: Job, output: Path) -> None:
        """Build the memory of the training examples, with all rounds."""
        from pema.generation.rounds import build_in_rounds

        building = self.building(batch_tokens=job.batch_tokens)
        build_in_rounds(plm, job.train, job.task, output, self.config(job), building, self.rounds)

    def train(self, job: Job, prepared: Path, output: Path) -> TrainingReport:
        """See `Method.train`; it reads only the memory and the head. The time is that of the rounds' trainings too."""
        from pema.adapter.training import train
        from pema.memory.reader import Memory

        memory = Memory.open(prepared / MEMORY)
        config = self.config(job)
        started = time.perf_counter()
        _, figures = train(memory, config, output / ADAPTER)
        rounds = (curve(prepared / f"{ADAPTER}-{k}" / LOG)[-1]["seconds"] for k in range(1, self.rounds + 1))
        seconds = round(time.perf_counter() - started + sum(rounds), 3)
        # Private training writes no losses: they are computed from the examples without noise.
        points = () if config.dp_epsilon is not None else tuple(curve(output / ADAPTER / LOG))
        return TrainingReport(figures["parameters"], seconds, points)

    def open(self, plm: PLM, job: Job, prepared: Path, trained: Path) -> AdaptedModel:
        """See `Method.open`."""
        from pema.adapter.module import Adapter
        from pema.methods.adapted.mixed import Mixed

        adapter = Adapter.from_pretrained(trained / ADAPTER)
        schedule = adapter.config.choose_schedule(self.schedule, self.lambda_max)
        return Mixed(plm, job, adapter, schedule, trained / ADAPTER)


def curve(log: Path) -> list[dict[str, float]]:
    """Read the learning curve from the log of a training; see `TrainingReport.curve`."""
    points: list[dict[str, float]] = []
    seconds = 0.0
    for line in log.read_text(encoding="utf-8").splitlines():
        event = json.loads(line)
        if event["event"] == "start":
            points.append({"epoch": 0, "seconds": 0.0, "held_out_loss": event["held_out"]["cross_entropy"]})
        elif event["event"] == "epoch":
            seconds += event["seconds"]
            points.append(
                {
                    "epoch": event["epoch"],
                    "seconds": round(seconds, 3),
                    "train_loss": event["train"]["cross_entropy"],
                    "held_out_loss": event["held_out"]["cross_entropy"],
                }
            )
    return points
