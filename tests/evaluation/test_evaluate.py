import re

import pytest
import sacrebleu

from pema.errors import ConfigError, DataError
from pema.evaluation.evaluate import METRICS, evaluate, get_metric
from pema.evaluation.score import Score, require_aligned
from pema.tasks.registry import TASKS, get_task

HYPOTHESES = ["Das Haus ist klein .", "Der Hund schläft.", "Ich sehe dich heute Abend nicht", ""]
REFERENCES = ["Das Haus ist klein.", "Der Hund schläft gerade.", "Ich sehe dich heute Abend nicht mehr.", "Ja."]


def test_bleu_and_chrf_are_sacrebleus_own():
    found = evaluate(get_task("translation"), HYPOTHESES, REFERENCES)
    bleu, chrf = sacrebleu.metrics.BLEU(), sacrebleu.metrics.CHRF()
    assert found == {
        "bleu": Score(bleu.corpus_score(HYPOTHESES, [REFERENCES]).score, f"BLEU|{bleu.get_signature()}"),
        "chrf": Score(chrf.corpus_score(HYPOTHESES, [REFERENCES]).score, f"chrF2|{chrf.get_signature()}"),
    }
    assert re.fullmatch(
        r"BLEU\|nrefs:1\|case:mixed\|eff:no\|tok:13a\|smooth:exp\|version:[\d.]+", found["bleu"].signature
    )
    assert re.fullmatch(r"chrF2\|nrefs:1\|case:mixed\|.*version:[\d.]+", found["chrf"].signature)


def test_every_task_is_scored_by_its_metrics():
    for task in TASKS.values():
        found = evaluate(task, REFERENCES, REFERENCES, sources=HYPOTHESES)
        assert tuple(found) == task.metrics
        assert all(score.signature for score in found.values())
    long = [text for text in REFERENCES if " " in text]
    best = {name: evaluate(get_task("qa"), long, long, metrics=[name])[name].value for name in METRICS}
    assert best == pytest.approx({name: 1.0 if name == "accuracy" else 100.0 for name in METRICS})


def test_annotated_references_add_formality():
    annotated = (["[F]Sie[/F]", "[F]Ihr[/F]"], ["[F]du[/F]", "[F]dein[/F]"])
    found = evaluate(get_task("style"), ["Sie da", "dein Hund"], ["a", "b"], annotated=annotated)
    assert list(found) == ["bleu", "chrf", "formality_accuracy"]
    assert found["formality_accuracy"].value == 0.5
    only = evaluate(
        get_task("style"),
        ["Sie!", "x"],
        ["a", "b"],
        annotated=annotated,
        metrics=["formality_accuracy"],
        matching="words",
    )
    assert only["formality_accuracy"].value == 1.0
    assert "matching:words" in only["formality_accuracy"].signature


def test_unknown_metrics_are_refused():
    with pytest.raises(ConfigError, match=r"no metric is called 'bleurt': choose among bleu, .*formality_accuracy"):
        evaluate(get_task("translation"), ["a"], ["a"], metrics=["bleurt"])
    with pytest.raises(ConfigError, match="formality_accuracy needs formal and informal references"):
        get_metric("formality_accuracy")


def test_texts_that_are_not_aligned_are_refused():
    with pytest.raises(DataError, match="not aligned: 1 hypotheses, 2 references"):
        evaluate(get_task("translation"), ["a"], ["a", "b"])
    with pytest.raises(DataError, match="not aligned: 1 hypotheses, 1 references, 2 sources"):
        evaluate(get_task("translation"), ["a"], ["a"], sources=["a", "b"])
    with pytest.raises(DataError, match="nothing to score: there are no hypotheses and no references"):
        evaluate(get_task("translation"), [], [])
    require_aligned(hypotheses=["a"], references=["b"])
