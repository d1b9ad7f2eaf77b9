"""`pema evaluate`: scores of hypotheses against references."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from pema.cli.options import AsJSON, TaskName, show


def evaluate(
    task: TaskName,
    hypotheses: Annotated[
        Path, typer.Option("--hypotheses", help="Generated texts, one per line, or JSONL with the field `text`.")
    ],
    references: Annotated[
        Path, typer.Option("--references", help="Reference texts, one per line, or data with targets: JSONL, CSV, ...")
    ],
    target_field: Annotated[
        str | None, typer.Option("--target-field", help="Column of --references; default: recognised.")
    ] = None,
    formal: Annotated[
        Path | None, typer.Option("--formal", help="Formal references with CoCoA-MT formality marks, for M-ACC.")
    ] = None,
    informal: Annotated[
        Path | None, typer.Option("--informal", help="Informal references with CoCoA-MT formality marks, for M-ACC.")
    ] = None,
    metrics: Annotated[
        list[str] | None,
        typer.Option(
            "--metric",
            help="A metric in place of the task's own; may be repeated. bleu:TOKENIZER is BLEU with that tokenizer of "
            "sacreBLEU's (zh, ja-mecab, char, ...); style_accuracy:MODEL, style_probability:MODEL "
            "and style_improvement:MODEL ask a text-classification model.",
        ),
    ] = None,
    sources: Annotated[
        Path | None,
        typer.Option(
            "--sources",
            help="Source texts for slot_errors and style_improvement, one per line; in .jsonl the field `source`.",
        ),
    ] = None,
    scores: Annotated[
        list[Path] | None,
        typer.Option("--scores", help="Scores of these hypotheses from reproduction/comet_score.py; may be repeated."),
    ] = None,
    as_json: AsJSON = False,
) -> None:
    """Score hypotheses with the task's metrics; every score carries its signature.

    Example: pema evaluate --task translation --hypotheses out.de --references test.de --json
    """
    from pema.errors import ConfigError
    from pema.evaluation.classifier_name import ClassifierName
    from pema.evaluation.elsewhere import ExternalScores
    from pema.evaluation.evaluate import evaluate as evaluated
    from pema.evaluation.notation import is_style, score_text
    from pema.evaluation.outputs import read_hypotheses, require_line_breaks
    from pema.evaluation.score import score
    from pema.tasks.readers import read_lines, read_references
    from pema.tasks.registry import get_task

    if (formal is None) != (informal is None):
        raise ConfigError("--formal and --informal go together: M-ACC compares the marks of both references.")
    for metric in filter(is_style, metrics or ()):
        ClassifierName.of(metric).require()
    annotated = None if formal is None or informal is None else (read_lines(formal), read_lines(informal))
    texts = read_hypotheses(hypotheses), read_references(references, target_field)
    require_line_breaks(hypotheses, *texts)
    results = evaluated(
        get_task(task),
        *texts,
        sources=None if sources is None else read_hypotheses(sources, "source"),
        annotated=annotated,
        metrics=metrics or None,
    )
    for path in scores or []:
        elsewhere = ExternalScores([path])
        results[elsewhere.name] = score(elsewhere, *texts)
    if as_json:
        scores_as_json = {
            name: {key: value for key, value in asdict(each).items() if value is not None}
            for name, each in results.items()
        }
        show(scores_as_json, True)
        return
    count = len(texts[0])
    lines = {}
    for name, each in results.items():
        rests = "" if each.texts is None else f"  on {each.texts:,} of {count:,} texts"
        lines[name] = f"{score_text(name, each.value)}{rests}  {each.signature}"
    show(lines, False)
