"""Several references of each segment, in every metric."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sacrebleu.metrics import BLEU, CHRF

from pema.errors import DataError
from pema.evaluation.elsewhere import ExternalScores, digest
from pema.evaluation.evaluate import METRICS, get_metric
from pema.evaluation.score import score
from pema.evaluation.significance import compare_means, paired_bootstrap

words = st.lists(st.sampled_from(["the", "a", "house", "is", "small"]), min_size=1, max_size=9).map(" ".join)
segments = st.lists(st.tuples(words, st.lists(words, min_size=1, max_size=4)), min_size=1, max_size=6)


def sides(pairs):
    return [text for text, _ in pairs], [tuple(gold) for _, gold in pairs]


@settings(deadline=None)
@given(segments)
@pytest.mark.parametrize("name", ["bleu", "chrf"])
def test_bleu_and_chrf_are_those_of_sacrebleu(name, pairs):
    hypotheses, references = sides(pairs)
    official = {"bleu": BLEU(force=True), "chrf": CHRF()}[name]
    most = max(map(len, references))
    streams = [[each[i] if i < len(each) else None for each in references] for i in range(most)]
    expected = official.corpus_score(hypotheses, streams).score
    result = score(get_metric(name), hypotheses, references)
    assert result.value == pytest.approx(expected)
    assert result.signature.endswith(str(official.get_signature()))


@settings(deadline=None)
@given(segments)
@pytest.mark.parametrize("name", ["rouge1", "rouge2", "rougeL", "exact_match", "f1"])
def test_the_best_reference_counts(name, pairs):
    hypotheses, references = sides(pairs)
    best = [
        max(score(get_metric(name), [text], [gold]).value for gold in each)
        for text, each in zip(hypotheses, references, strict=True)
    ]
    result = score(get_metric(name), hypotheses, references)
    assert result.value == pytest.approx(np.mean(best))
    several = sum(map(len, references))
    assert (f"|n:{len(pairs)}|refs:{several}|" in result.signature) == (several > len(pairs))


def test_any_of_several_labels_is_right():
    result = score(get_metric("accuracy"), ["Positive.", "b", "c"], [["positive", "good"], "b", ["d", "e"]])
    assert (result.value, result.signature) == (
        pytest.approx(2 / 3),
        "accuracy|norm:nfc,width,casefold,ends|n:3|refs:5|scale:1",
    )
    result = score(get_metric("accuracy"), ["us"], [["US", "us"]])
    assert result.value == 1
    assert "casefold" not in result.signature  # it distinguishes two labels


@pytest.mark.parametrize("name", METRICS)
def test_one_reference_in_a_list_is_one_reference(name):
    hypotheses, references = ["the house", "a dog is here", "no"], ["the small house", "a dog is here", "yes"]
    assert score(get_metric(name), hypotheses, references) == score(
        get_metric(name), hypotheses, [[r] for r in references]
    )


@pytest.mark.parametrize("name", METRICS)
def test_more_references_never_lower_a_perfect_score_and_can_be_resampled(name):
    hypotheses = ["the house is small here", "a dog is here now", "no it is not there"]
    references = [("other words stand in this", text) for text in hypotheses]
    perfect = score(get_metric(name), hypotheses, hypotheses).value
    assert score(get_metric(name), hypotheses, references).value == pytest.approx(perfect)
    comparison = paired_bootstrap(get_metric(name), hypotheses[::-1], hypotheses, references, samples=20)
    assert comparison.system.value == pytest.approx(perfect)
    assert comparison.baseline.value < perfect
    intervals, _ = compare_means(get_metric(name), {"x": [hypotheses]}, references, [], samples=20)
    assert intervals["x"].mean == pytest.approx(perfect)


def test_a_segment_without_reference():
    with pytest.raises(DataError, match="segment 2 has no reference: give at least one"):
        score(get_metric("bleu"), ["a", "b"], ["a", []])


def test_scores_from_elsewhere_are_of_the_first_reference(tmp_path):
    content = {"metric": "comet", "segments": [0.5], "signature": "s"}
    content |= {"hypotheses_sha256": digest(["a"]), "references_sha256": digest(["b"])}
    (tmp_path / "s.json").write_text(json.dumps(content))
    assert score(ExternalScores([tmp_path / "s.json"]), ["a"], [("b", "c")]).value == 0.5
    with pytest.raises(DataError, match="computed on other references"):
        score(ExternalScores([tmp_path / "s.json"]), ["a"], [("c", "b")])
