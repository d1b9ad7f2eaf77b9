"""Scoring of hypotheses with a task's metrics."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from pema.errors import ConfigError
from pema.evaluation.answers import exact_match, f1, verbatim_match
from pema.evaluation.classification import accuracy, label_accuracy
from pema.evaluation.formality import FormalityAccuracy, Matching
from pema.evaluation.notation import STYLE, is_style
from pema.evaluation.own_metric import own_metric
from pema.evaluation.score import Metric, Reference, Score, require_aligned, score
from pema.evaluation.simplification import Sari
from pema.evaluation.slots import SlotErrors
from pema.evaluation.summarisation import rouge
from pema.evaluation.translation import bleu, chrf
from pema.own import is_own
from pema.schema import require_texts, unknown
from pema.tasks.registry import Task, chosen_task

FORMALITY = "formality_accuracy"
WITH_SOURCES: dict[str, Callable[[Sequence[str] | None], Metric]] = {"sari": Sari, "slot_errors": SlotErrors}
"""The metrics that compare the hypotheses with their sources."""
LABEL_ACCURACY = "label_accuracy"
"""The metric of labels that were chosen by likelihood, instead of hypotheses."""

BLEU_WITH = "bleu:"
OWN = "MODULE:FUNCTION"
METRICS: dict[str, Callable[[], Metric]] = {
    "bleu": bleu,
    "chrf": chrf,
    "rouge1": partial(rouge, "rouge1"),
    "rouge2": partial(rouge, "rouge2"),
    "rougeL": partial(rouge, "rougeL"),
    "exact_match": exact_match,
    "verbatim_match": verbatim_match,
    "f1": f1,
    "accuracy": accuracy,
    LABEL_ACCURACY: label_accuracy,
}
"""The metrics that need only hypotheses, or chosen labels, and references. `bleu:TOKENIZER` is BLEU with that
sacreBLEU tokenizer; `formality_accuracy` needs annotated references, those of `WITH_SOURCES` sources, and
`MEASURE:MODEL` a classifier (see `pema.evaluation.style`)."""


def evaluate(
    task: str | Task,
    hypotheses: Sequence[str],
    references: Sequence[Reference],
    *,
    sources: Sequence[str] | None = None,
    annotated: tuple[Sequence[str], Sequence[str]] | None = None,
    matching: Matching | None = None,
    metrics: Sequence[str] | None = None,
    chosen: Sequence[str] | None = None,
) -> dict[str, Score]:
    """Score hypotheses against references.

    Args:
        task: the task or its name; its metrics are computed unless `metrics` names others.
        hypotheses: one per source.
        references: aligned with the hypotheses; for each a text, or several valid ones.
        sources: aligned with the hypotheses; `sari`, `slot_errors` and `style_improvement` read them.
        annotated: formal and informal references with [F]...[/F] marks; adds `formality_accuracy` to the metrics.
        matching: how annotated phrases match; see `pema.evaluation.formality`.
        metrics: names of metrics.
        chosen: labels chosen by likelihood, aligned with the hypotheses; `label_accuracy` is their accuracy.

    Returns:
        Scores by metric name, in the requested order.

    Raises:
        DataError: the texts are not aligned, or there are none.
        ConfigError: a metric is unknown, or lacks its inputs (annotated references, a classifier, sources, labels).
        OwnerError: a classifier cannot be loaded.
    """
    require_texts("metrics", metrics)
    aligned = {"hypotheses": hypotheses, "references": references}
    require_aligned(**aligned if sources is None else aligned | {"sources": sources})
    names = list(chosen_task(task).metrics if metrics is None else metrics)
    if metrics is None and annotated is not None and FORMALITY not in names:
        names.append(FORMALITY)
    if LABEL_ACCURACY in names and chosen is None:
        raise ConfigError(
            f"{LABEL_ACCURACY} is measured by `pema compare`, which chooses the labels by likelihood: here give "
            "accuracy, and the labels that `pema classify` wrote as hypotheses."
        )
    return {
        name: score(
            get_metric(name, annotated, matching, sources),
            chosen if name == LABEL_ACCURACY and chosen is not None else hypotheses,
            references,
        )
        for name in names
    }


def get_metric(
    name: str,
    annotated: tuple[Sequence[str], Sequence[str]] | None = None,
    matching: Matching | None = None,
    sources: Sequence[str] | None = None,
) -> Metric:
    """Return the metric called `name`; see `evaluate` for the arguments and the errors.

    `module:function` is a metric of the user's own; see `pema.evaluation.own_metric`.
    """
    if name == FORMALITY:
        if annotated is None:
            raise ConfigError(f"{FORMALITY} needs formal and informal references with [F]...[/F] marks: give both.")
        return FormalityAccuracy(*annotated, matching=matching)
    if name in WITH_SOURCES:
        return WITH_SOURCES[name](sources)
    if is_style(name):
        from pema.evaluation.style import style  # loads torch, which other metrics do not need

        return style(name, sources)
    if name.startswith(BLEU_WITH):
        return bleu(name.removeprefix(BLEU_WITH))
    if is_own(name):
        return own_metric(name)
    if name not in METRICS:
        further = (f"{BLEU_WITH}TOKENIZER", FORMALITY, *WITH_SOURCES, *(f"{measure}:MODEL" for measure in STYLE), OWN)
        raise ConfigError(unknown("metric", name, [*METRICS, *further]))
    return METRICS[name]()
