"""The choice among the candidates of a line on the dev examples, by the texts that each generates, or by perplexity."""

from __future__ import annotations

import math
from collections.abc import Sequence

from pema.evaluation.choice import rank
from pema.evaluation.evaluate import evaluate
from pema.experiments.experiment import PERPLEXITY, Experiment, Line
from pema.experiments.records import Trial
from pema.experiments.workplace import Workplace


def trials(experiment: Experiment, workplace: Workplace, line: Line) -> list[Trial]:
    """Measure every candidate of a line with the first seed; none if there is nothing to choose.

    All have the perplexity of the dev targets. The score of the texts for dev is computed if the choice needs it.
    """
    found = []
    for candidate in line.candidates() if line.choice else ():
        stages, plm = workplace.stages(line.method, candidate, experiment.seeds[0]), workplace.plm(candidate)
        perplexity = workplace.dev_perplexity(stages, plm)
        score = None
        if experiment.generates_on_dev(line):
            score = _score(experiment, workplace.dev_texts(stages, plm))
        found.append(Trial(settings=candidate, dev_perplexity=perplexity, dev_score=score))
    return found


def best(tried: Sequence[Trial], metric: str) -> Trial:
    """Return the best candidate by `metric`; of equal ones that with the lowest perplexity, and of these the first."""

    def place(trial: Trial) -> tuple[float, float]:
        likely = rank(PERPLEXITY, trial.dev_perplexity)
        return (likely if metric == PERPLEXITY else rank(metric, trial.dev_score)), likely

    return min(tried, key=place)


def _score(experiment: Experiment, texts: Sequence[str]) -> float | None:
    """Score texts for the dev examples of the choice; None if the metric is not defined on them."""
    numbers, metric = experiment.choice_numbers, experiment.choice_metric
    examples = [experiment.data.dev[i] for i in numbers]
    annotated = None
    if "dev" in experiment.data.annotated:
        formal, informal = experiment.data.annotated["dev"]
        annotated = [formal[i] for i in numbers], [informal[i] for i in numbers]
    scores = evaluate(
        experiment.task,
        texts,
        [example.references for example in examples],
        sources=[example.source for example in examples],
        annotated=annotated,
        metrics=[metric],
        chosen=texts,
    )
    value = scores[metric].value
    return value if math.isfinite(value) else None
