import re
import sys

import pytest
import sacrebleu
from hypothesis import given, settings
from hypothesis import strategies as st

from pema.errors import ConfigError, DataError
from pema.evaluation.evaluate import METRICS, evaluate, get_metric
from pema.evaluation.score import Score, require_aligned, score
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


CHINESE = ["今天天气很好，我们去公园散步吧。", "他昨天买了一本新书。"]
JAPANESE = ["今日はとても天気がいいです。", "彼は昨日新しい本を買った。"]


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.text("ab c.天\u0301", max_size=9), st.text("ab c.天\u0301", max_size=9)), min_size=1))
def test_bleu_and_chrf_are_sacrebleus_own_on_any_text(pairs):
    said, gold = zip(*pairs, strict=True)
    for tokenizer in ("13a", "zh", "char", "intl"):
        own = sacrebleu.metrics.BLEU(tokenize=tokenizer)
        found = score(get_metric(f"bleu:{tokenizer}"), said, gold)
        assert found.value == pytest.approx(own.corpus_score(said, [gold]).score, abs=1e-9)
        assert found.signature == f"BLEU|{own.get_signature()}"
    own = sacrebleu.metrics.CHRF().corpus_score(said, [gold]).score
    assert score(get_metric("chrf"), said, gold).value == pytest.approx(own, abs=1e-9)


@pytest.mark.parametrize(
    ("references", "tokenizer"),
    [
        (REFERENCES, "13a"),
        (["שלום עולם"], "13a"),
        (["오늘 날씨가 좋다."], "13a"),
        (["Das Wort 天气 heißt Wetter."], "13a"),
        (["123", "..."], "13a"),
        (CHINESE, "zh"),
        ([*CHINESE, "iPhone", "《もののけ》"], "zh"),
        (JAPANESE, "char"),
        (["ナンバーワン"], "char"),
        (["วันนี้อากาศดีมาก"], "char"),
        (["ថ្ងៃនេះអាកាសធាតុល្អ"], "char"),
    ],
)
def test_bleu_is_tokenised_for_the_script_of_the_references(references, tokenizer):
    found = score(get_metric("bleu"), references, references)
    assert f"|tok:{tokenizer}|" in found.signature
    assert found == score(get_metric(f"bleu:{tokenizer}"), references, references)


def test_a_nearly_right_translation_without_spaces_is_not_worth_nothing():
    said = [CHINESE[0].replace("散步", "走走"), CHINESE[1].replace("新", "")]
    found = evaluate(get_task("translation"), said, CHINESE)["bleu"]
    assert found.value == pytest.approx(sacrebleu.corpus_bleu(said, [CHINESE], tokenize="zh").score)
    assert found.value > 50


@pytest.mark.parametrize(("references", "better"), [(CHINESE, "zh"), (JAPANESE, "char")])
def test_a_tokenizer_by_spaces_on_text_without_spaces_is_noted(references, better, capsys):
    score(get_metric("bleu:13a"), references, references)
    assert f"belong to a script without spaces: use bleu:{better}." in " ".join(capsys.readouterr().err.split())
    score(get_metric(f"bleu:{better}"), references, references)
    score(get_metric("bleu:13a"), REFERENCES, REFERENCES)
    assert not capsys.readouterr().err


@pytest.mark.parametrize("name", ["bleu", "chrf"])
def test_letters_that_are_composed_on_one_side_only_are_noted(name, capsys):
    composed, decomposed = ["Das ist schön.", "Ja."], ["Das ist scho\u0308n.", "Ja."]
    for said, gold, side in ((decomposed, composed, "hypotheses"), (composed, decomposed, "references")):
        assert score(get_metric(name), said, gold).value < 100
        assert f"1 {side} are not in composed letters (NFC), but the other side is" in " ".join(
            capsys.readouterr().err.split()
        )
    for same in (composed, decomposed):
        assert score(get_metric(name), same, same).value == pytest.approx(100)
    assert not capsys.readouterr().err


def test_tokenizers_that_cannot_be_used_are_named(monkeypatch):
    with pytest.raises(ConfigError, match=r"unknown sacreBLEU tokenizer 'moses': use .*zh"):
        get_metric("bleu:moses")
    monkeypatch.setitem(sys.modules, "MeCab", None)
    monkeypatch.delitem(sys.modules, "sacrebleu.tokenizers.tokenizer_ja_mecab", raising=False)
    with pytest.raises(ConfigError, match=r"tokenizer 'ja-mecab' cannot be used on this machine: .*sacrebleu\[ja\]"):
        get_metric("bleu:ja-mecab")


def test_every_task_is_scored_by_its_metrics():
    for task in TASKS.values():
        found = evaluate(task, REFERENCES, REFERENCES, sources=HYPOTHESES)
        assert tuple(found) == task.metrics
        assert all(score.signature for score in found.values())
    long = [text for text in REFERENCES if " " in text]
    best = {name: evaluate(get_task("qa"), long, long, metrics=[name], chosen=long)[name].value for name in METRICS}
    assert best == pytest.approx({name: 1.0 if name.endswith("accuracy") else 100.0 for name in METRICS})


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
    with pytest.raises(ConfigError, match=r"unknown metric 'bleurt': .*did you mean 'bleu'\?"):
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


@pytest.mark.parametrize(
    ("arguments", "metrics", "message"),
    [
        (("ab", ["a", "b"]), None, "hypotheses must be a list of texts, not the text 'ab'"),
        ((["a", "b"], "ab"), None, "references must be a list of texts, not the text 'ab'"),
        ((["a"], ["b"]), "chrf", "metrics must be a list of texts, not the text 'chrf'"),
        ((["a", None], ["b", "c"]), None, "hypotheses, number 2: None is not a text"),
        ((["a"], [["b", 3]]), None, "references, number 1: a list of 2 items is not a text"),
    ],
)
def test_what_is_not_a_list_of_texts_is_refused(arguments, metrics, message):
    """The characters of a text were scored as texts."""
    with pytest.raises((ConfigError, DataError), match=message):
        evaluate("translation", *arguments, metrics=metrics)
