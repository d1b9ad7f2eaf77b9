"""The choice of an adapter's schedule on dev examples, by the texts that are generated with it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from pema.adapter.module import Adapter, require_adapter
from pema.adapter.schedule import Constant, GradualUnrolling, Linear, NamedSchedule, NoAdapter
from pema.errors import ConfigError, DataError
from pema.evaluation.choice import TEXTS, rank
from pema.evaluation.evaluate import evaluate, get_metric
from pema.generation.decoding import adapters_task, generate
from pema.schema import require
from pema.tasks.example import Example, require_examples
from pema.tasks.held_out import spread
from pema.tasks.registry import Task, chosen_task

if TYPE_CHECKING:
    from pema.cluster.replicas import Replicas
    from pema.owner.contract import PLM

CANDIDATES: tuple[NamedSchedule, ...] = (
    *map(Constant, (0.5, 0.7, 0.9, 1.0)),
    Linear(),
    GradualUnrolling(),
    GradualUnrolling(1.0),
)
"""Schedules that are compared by default, beside the adapter's own."""


@dataclass(frozen=True)
class Tuning:
    """Scores of schedules on the same examples.

    Attributes:
        metric: name of the metric.
        texts: number of texts per schedule.
        scores: (schedule, score) in the order of the candidates, the adapter's own schedule first; a score is None if
            the metric is not defined on the texts.
        plm_alone: score of the PLM without the adapter.
        signature: signature of the metric.
    """

    metric: str
    texts: int
    scores: tuple[tuple[NamedSchedule, float | None], ...]
    plm_alone: float | None
    signature: str

    @property
    def best(self) -> NamedSchedule:
        """The schedule with the best score; of equal ones the first."""
        return min(self.scores, key=lambda each: rank(self.metric, each[1]))[0]

    @property
    def score(self) -> float | None:
        """The score of the best schedule."""
        return dict(self.scores)[self.best]

    @property
    def helps(self) -> bool:
        """Whether the adapter with the best schedule scores better than the PLM alone."""
        return rank(self.metric, self.score) < rank(self.metric, self.plm_alone)

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-ready values."""
        return {
            "metric": self.metric,
            "texts": self.texts,
            "schedule": self.best.to_dict(),
            "score": self.score,
            "plm_alone": self.plm_alone,
            "scores": [{**schedule.to_dict(), "score": score} for schedule, score in self.scores],
            "signature": self.signature,
        }


def tune(
    plm: PLM | Replicas,
    adapter: Adapter,
    examples: Sequence[Example],
    *,
    metric: str | None = None,
    texts: int = TEXTS,
    schedules: Sequence[NamedSchedule] = CANDIDATES,
    task: str | Task | None = None,
    **settings: Any,  # noqa: ANN401
) -> Tuning:
    """Choose the adapter's schedule by the texts that it generates, and make it the adapter's own.

    Nothing is trained. The examples must not be those that the adapter was trained on, nor the ones that results are
    reported on. `adapter.config` is replaced; `adapter.save_pretrained` stores it.

    Args:
        plm: the PLM, or `replicas` of one on a Ray cluster.
        adapter: the adapter.
        examples: dev examples, with all their references.
        metric: name of the metric; None: the task's first one.
        texts: maximum number of examples that a text is generated for, evenly spaced over all of them.
        schedules: candidates; the adapter's own schedule is one too.
        task: the task or its name; None: the adapter's own.
        settings: settings of generation; see `pema.generate`.

    Raises:
        DataError: there are no examples; or as `generate`.
        ConfigError: there is no candidate; a metric or setting is unknown; or as `generate`.
        MismatchError: the adapter belongs to another PLM, task or template.
    """
    require("texts", texts, int, least=1)
    if not examples:
        raise DataError("there are no examples to choose a schedule on: give dev examples.")
    for name in ("schedule", "lambda_max"):
        if name in settings:
            raise ConfigError(f"{name} is what is chosen here: name candidates with schedules=[...].")
    require_adapter(adapter)
    task = adapters_task(adapter) if task is None else chosen_task(task)
    examples = require_examples(examples)
    name = task.metrics[0] if metric is None else metric
    chosen = [examples[i] for i in spread(len(examples), texts)]
    references = [example.references for example in chosen]
    sources = [example.source for example in chosen]
    get_metric(name, sources=sources)  # one that cannot be computed is refused before anything is generated
    own = adapter.config.choose_schedule()
    signature, found = "", {}
    for schedule in (NoAdapter(), *dict.fromkeys((own, *schedules))):
        generated = generate(plm, adapter, chosen, task, schedule, **settings)
        score = evaluate(task, generated, references, sources=sources, metrics=[name])[name]
        found[schedule], signature = (score.value if math.isfinite(score.value) else None), score.signature
    alone = found[NoAdapter()] if isinstance(own, NoAdapter) else found.pop(NoAdapter())
    tuning = Tuning(name, len(chosen), tuple(found.items()), alone, signature)
    adapter.config = replace(
        adapter.config,
        schedule=tuning.best,
        training={**adapter.config.training, "tuning": tuning.to_dict()},
    )
    return tuning
