import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pema.evaluation.answers import exact_match, f1, matches_exactly, normalise_answer, word_f1
from pema.evaluation.classification import accuracy, normalise_label
from pema.evaluation.score import score
from pema.evaluation.summarisation import longest_common_subsequence, rouge, rouge_1, rouge_2, rouge_l

words = st.lists(st.sampled_from(["the", "cat", "sat", "on", "a", "mat", "x1"]), max_size=12)
sentences = words.map(" ".join)


def test_rouge_of_lins_example():
    reference, hypothesis = "police killed the gunman", "police kill the gunman"
    assert rouge_1(hypothesis, reference) == 3 / 4
    assert rouge_2(hypothesis, reference) == 1 / 3
    assert rouge_l(hypothesis, reference) == 3 / 4
    assert rouge_l("the gunman kill police", reference) == 2 / 4
    assert rouge_1("the the the", "the") == pytest.approx(2 * (1 / 3) * 1 / (1 / 3 + 1))


def test_rouge_takes_letters_of_any_script():
    assert rouge_1("Die Straße, schön!", "die straße SCHÖN") == 1.0
    assert rouge_1("schön", "schon") == 0.0
    assert rouge_1("", "") == rouge_2("one", "one") == rouge_l("?", "one") == 0.0


@given(left=words, right=words)
def test_longest_common_subsequence_equals_the_table(left, right):
    table = [[0] * (len(right) + 1) for _ in range(len(left) + 1)]
    for i, a in enumerate(left):
        for j, b in enumerate(right):
            table[i + 1][j + 1] = table[i][j] + 1 if a == b else max(table[i][j + 1], table[i + 1][j])
    assert longest_common_subsequence(left, right) == table[-1][-1]


@settings(max_examples=50, deadline=None)
@given(hypothesis=sentences, reference=sentences)
def test_rouge_equals_the_rouge_score_package_on_ascii(hypothesis, reference):
    scorer = pytest.importorskip("rouge_score.rouge_scorer").RougeScorer(["rouge1", "rouge2", "rougeL"])
    expected = scorer.score(reference, hypothesis)
    assert rouge_1(hypothesis, reference) == pytest.approx(expected["rouge1"].fmeasure)
    assert rouge_2(hypothesis, reference) == pytest.approx(expected["rouge2"].fmeasure)
    assert rouge_l(hypothesis, reference) == pytest.approx(expected["rougeL"].fmeasure)


def test_a_mean_over_the_corpus():
    found = score(rouge("rouge1"), ["a b", "c"], ["a b", "d"])
    assert found.value == 50.0
    assert found.signature == "rouge1|measure:f1|case:lc|tok:alphanumeric|stem:no|n:2|scale:100"


@pytest.mark.parametrize(
    ("hypothesis", "reference", "exact", "overlap"),
    [
        ("The Eiffel Tower.", "eiffel tower", 1.0, 1.0),
        ("in the year 1999", "1999", 0.0, 0.5),
        ("Paris", "London", 0.0, 0.0),
        ("", "", 1.0, 1.0),
        ("the", "", 1.0, 1.0),
        ("", "Paris", 0.0, 0.0),
        ("to be to", "to be or not to be", 0.0, 2 * 1.0 * 0.5 / 1.5),
    ],
)
def test_squad(hypothesis, reference, exact, overlap):
    assert matches_exactly(hypothesis, reference) == exact
    assert word_f1(hypothesis, reference) == pytest.approx(overlap)


def test_squad_normalisation_and_scale():
    assert normalise_answer("  An apple-pie,\tthe theory ") == "applepie theory"
    assert score(exact_match(), ["a b", "x"], ["b", "y"]).value == 50.0
    assert score(f1(), ["b", "x y"], ["b", "x"]).value == pytest.approx(100 * (1 + 2 / 3) / 2)


@pytest.mark.parametrize(
    ("text", "label"),
    [
        (" Positive.", "positive"),
        ('"Not  sure"', "not sure"),
        ("+", "+"),
        ("STRASSE", "strasse"),
        ("Straße", "strasse"),
    ],
)
def test_labels(text, label):
    assert normalise_label(text) == label


def test_accuracy():
    found = score(accuracy(), ["Positive", "negative.", "neutral", "x"], ["positive", "negative", "positive", "y"])
    assert found.value == 0.5
    assert found.signature.startswith("accuracy|norm:nfkc,casefold,ends|n:4")
