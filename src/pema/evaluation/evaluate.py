"""Score hypotheses with a task's metrics."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from pema.errors import ConfigError
from pema.evaluation.answers import exact_match, f1
from pema.evaluation.classification import accuracy
from pema.evaluation.formality import FormalityAccuracy, Matching
from pema.evaluation.score import Metric, Score, require_aligned, score
from pema.evaluation.style import MEASURES, is_style, style
from pema.evaluation.summarisation import rouge
from pema.evaluation.translation import bleu, chrf
from pema.tasks.registry import Task

FORMALITY = "formality_accuracy"
BLEU_WITH = "bleu:"
METRICS: dict[str, Callable[[], Metric]] = {
    "bleu": bleu,
    "chrf": chrf,
    "rouge1": partial(rouge, "rouge1"),
    "rouge2": partial(rouge, "rouge2"),
    "rougeL": partial(rouge, "rougeL"),
    "exact_match": exact_match,
    "f1": f1,
    "accuracy": accuracy,
}
"""The metrics that need nothing but hypotheses and references. `bleu:TOKENIZER` is BLEU with that tokenizer of
sacreBLEU's; `formality_accuracy` needs annotated references, and `MEASURE:MODEL` a classifier (see
`pema.evaluation.style`)."""


def evaluate(
    task: Task,
    hypotheses: Sequence[str],
    references: Sequence[str],
    *,
    sources: Sequence[str] | None = None,
    annotated: tuple[Sequence[str], Sequence[str]] | None = None,
    matching: Matching | None = None,
    metrics: Sequence[str] | None = None,
) -> dict[str, Score]:
    """Score hypotheses against references.

    Args:
        task: its metrics are computed unless `metrics` names others.
        hypotheses: one per source.
        references: aligned with the hypotheses.
        sources: aligned too, for `style_improvement`, the only metric that reads them.
        annotated: formal and informal references with [F]...[/F] marks; `formality_accuracy` is then computed as well.
        matching: how annotated phrases match; see `pema.evaluation.formality`.
        metrics: names of metrics.

    Returns:
        Scores by the metric's name, in the order asked for.

    Raises:
        DataError: the texts are not aligned, or there are none.
        ConfigError: an unknown metric, or one without what it needs (annotated references, a classifier, sources).
        OwnerError: a classifier that cannot be loaded.
    """
    aligned = {"hypotheses": hypotheses, "references": references}
    require_aligned(**aligned if sources is None else aligned | {"sources": sources})
    names = list(task.metrics if metrics is None else metrics)
    if metrics is None and annotated is not None and FORMALITY not in names:
        names.append(FORMALITY)
    return {name: score(get_metric(name, annotated, matching, sources), hypotheses, references) for name in names}


def get_metric(
    name: str,
    annotated: tuple[Sequence[str], Sequence[str]] | None = None,
    matching: Matching | None = None,
    sources: Sequence[str] | None = None,
) -> Metric:
    """The metric called `name`; see `evaluate` for the arguments and the errors."""
    if name == FORMALITY:
        if annotated is None:
            raise ConfigError(f"{FORMALITY} needs formal and informal references with [F]...[/F] marks: give both.")
        return FormalityAccuracy(*annotated, matching=matching)
    if is_style(name):
        return style(name, sources)
    if name.startswith(BLEU_WITH):
        return bleu(name.removeprefix(BLEU_WITH))
    if name not in METRICS:
        known = [*METRICS, f"{BLEU_WITH}TOKENIZER", FORMALITY, *(f"{measure}:MODEL" for measure in MEASURES)]
        raise ConfigError(f"no metric is called {name!r}: choose among {', '.join(known)}.")
    return METRICS[name]()
