import ast
import re
import string
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pema.evaluation import translation
from pema.evaluation.answers import (
    exact_match,
    f1,
    matches_exactly,
    matches_verbatim,
    normalise_answer,
    verbatim_match,
    word_f1,
)
from pema.evaluation.classification import accuracy, trimmed
from pema.evaluation.score import score
from pema.evaluation.summarisation import longest_common_subsequence, rouge, rouge_1, rouge_2, rouge_l
from pema.tasks.characters import canonical, words

some_words = st.lists(st.sampled_from(["the", "cat", "sat", "on", "a", "mat", "x1"]), max_size=12)
sentences = some_words.map(" ".join)


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


@given(left=some_words, right=some_words)
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
    assert found.signature == "rouge1|measure:f1|case:lc|tok:words,unspaced:chars|stem:no|n:2|scale:100"


@pytest.mark.parametrize(
    ("hypothesis", "reference", "exact", "overlap"),
    [
        ("The Eiffel Tower.", "eiffel tower", 1.0, 1.0),
        ("in the year 1999", "1999", 0.0, 0.5),
        ("Paris", "London", 0.0, 0.0),
        ("", "", 1.0, 1.0),
        ("the", "", 0.0, 0.0),
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


def test_f1_of_scripts_without_spaces_is_of_characters():
    assert word_f1("北京大学", "北京") == pytest.approx(2 / 3)
    assert word_f1("iPhone手机", "手机") == pytest.approx(0.8)
    assert matches_exactly("北京 大学", "北京大学") == 0.0
    assert score(f1(), ["a"], ["a"]).signature == "f1|norm:squad,symbols|tok:spaces,unspaced:chars|n:1|scale:100"


def squad(text):
    """The official scorer's normalisation."""
    lowered = "".join(each for each in text.lower() if each not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", lowered).split())


@given(
    st.lists(st.sampled_from(["the cat", "a dog,", "An apple-pie", '"Paris"', "it's", "(1999)", "3,000", "Löwe!"]))
    .map(" ".join)
    .map(lambda text: text + " end.")
)
def test_ordinary_answers_are_normalised_as_by_squad(text):
    assert normalise_answer(text) == squad(text)


DIFFERENT = [
    ("-1", "1"),
    ("+1", "-1"),
    ("C++", "C"),
    ("C#", "C"),
    ("A+", "A"),
    ("50%", "50"),
    ("1.5", "15"),
    (".5", "5"),
    ("1,5", "15"),
    ("10:30", "1030"),
    ("1/2", "12"),
    ("x²", "x2"),
    ("schön", "schon"),
]


@pytest.mark.parametrize(("one", "other"), DIFFERENT)
def test_what_differs_is_different(one, other):
    for said, gold in ((one, other), (other, one)):
        assert matches_exactly(said, gold) == 0.0
        assert word_f1(said, gold) == 0.0
        assert score(accuracy(), [said], [gold]).value == 0.0


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("vitamin A", "vitamin"),
        ("A", ""),
        ("A", "the"),
        ("...", ""),
        ("?", "!"),
        ("A, B", "B"),
        ("the", ""),
    ],
)
def test_an_answer_that_squad_would_empty_stays(one, other):
    assert squad(one) == squad(other)
    assert matches_exactly(one, other) == matches_exactly(other, one) == 0.0
    assert matches_exactly(one, one) == word_f1(one, one) == 1.0


@pytest.mark.parametrize(
    ("one", "other"), [("schön", "scho\u0308n"), ("１２", "12"), ("ｶﾞ", "ガ"), ("A.", "a"), ("1,000", "1000")]
)
def test_what_is_the_same_is_equal(one, other):
    assert matches_exactly(one, other) == word_f1(other, one) == 1.0


@pytest.mark.parametrize(
    ("said", "gold", "right"),
    [
        (" Positive.", "positive", 1.0),
        ('"Not  sure"', "not sure", 1.0),
        ('"Positive."', "Positive", 1.0),
        ("“Positive”.", "Positive", 1.0),
        ("STRASSE", "Straße", 1.0),
        ("scho\u0308n", "schön", 1.0),
        ("ＡＢＣ", "abc", 1.0),
        ("正。", "正", 1.0),
        ("", "positive", 0.0),
        (".", "!", 0.0),
        (".", ".", 1.0),
        ('5"', "5'", 0.0),
        ('5"', "5", 0.0),
    ],
)
def test_labels(said, gold, right):
    assert score(accuracy(), [said], [gold]).value == right


def test_a_normalisation_that_would_make_two_labels_equal_is_not_made():
    found = score(accuracy(), ["us", "US.", "It", "it"], ["US", "us", "IT", "it"])
    assert found.value == 0.25
    assert found.signature == "accuracy|norm:nfc,width,ends|n:4|scale:1"
    found = score(accuracy(), ["what", "What?", "No."], ["what?", "what", "no."])
    assert found.value == 1 / 3
    assert found.signature == "accuracy|norm:nfc,width,casefold|n:3|scale:1"


@given(st.text(max_size=8))
def test_trimming_ends_and_keeps_something(text):
    assert trimmed(trimmed(text)) == trimmed(text)
    assert trimmed(text) in text
    assert bool(trimmed(text)) == bool(text)


def test_accuracy():
    found = score(accuracy(), ["Positive", "negative.", "neutral", "x"], ["positive", "negative", "positive", "y"])
    assert found.value == 0.5
    assert found.signature == "accuracy|norm:nfc,width,casefold,ends|n:4|scale:1"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The don't x_1, C3PO", ["The", "don", "t", "x", "1", "C3PO"]),
        ("हिन्दी भाषाएँ", ["हिन्दी", "भाषाएँ"]),
        ("বাংলা ভাষা, தமிழ்", ["বাংলা", "ভাষা", "தமிழ்"]),
        ("scho\u0308n", ["schön"]),
        ("שָׁלוֹם עֲלֵיכֶם", [unicodedata.normalize("NFC", word) for word in ("שָׁלוֹם", "עֲלֵיכֶם")]),
        ("می\u200cخواهم", ["می\u200cخواهم"]),
        ("天气很好ABC 12", ["天", "气", "很", "好", "ABC", "12"]),
        ("ガスﾀﾞ", ["ガ", "ス", "ダ"]),
        ("นี่ดี", ["นี่", "ดี"]),
        ("한국어 문장", ["한국어", "문장"]),
        ("\u0301", []),
    ],
)
def test_words_of_every_script(text, expected):
    assert words(text) == expected


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_words_do_not_depend_on_composition_and_leave_nothing_out(text):
    assert words(unicodedata.normalize("NFD", text)) == words(text) == words(canonical(text))
    letters = [each for each in canonical(text) if each.isalnum()]
    assert [each for word in words(text) for each in word if each.isalnum()] == letters


def test_rouge_of_scripts_with_marks_and_without_spaces():
    assert rouge_1("हिन्दी भाषा", "हिन्दी भाषाएँ") == 0.5
    assert rouge_1("schön Wörter", unicodedata.normalize("NFD", "schön Wörter")) == 1.0
    assert rouge_l("今天天气好", "今天天气很好") == pytest.approx(2 * 5 / 11)


def test_rouge_of_known_values():
    """What the `rouge-score` package 0.1.2 gives with use_stemmer=False."""
    reference = "The quick brown fox, which the hunter's dog had seen, jumps over 2 lazy dogs."
    hypothesis = "A quick fox jumped over the hunter's two lazy dogs; the dog had seen it."
    assert rouge_1(hypothesis, reference) == pytest.approx(0.75)
    assert rouge_2(hypothesis, reference) == pytest.approx(1 / 3)
    assert rouge_l(hypothesis, reference) == pytest.approx(0.5)


def test_only_public_names_of_sacrebleu_are_used():
    tree = ast.parse(Path(translation.__file__).read_text(encoding="utf-8"))
    used = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute) and node.attr.startswith("_")]
    assert {ast.unparse(node.value) for node in used} <= {"self"}


@pytest.mark.parametrize(
    ("said", "gold", "value"),
    [
        ("ls  -l\n", "ls -l", 1),
        ("ls -L", "ls -l", 0),
        ("find . -name 'a'", 'find . -name "a"', 0),
        ("the a", "a", 0),
        ("cafe\u0301", "caf\u00e9", 1),
        ("", "", 1),
    ],
)
def test_verbatim_match_ignores_white_space_only(said, gold, value):
    assert matches_verbatim(said, gold) == value
    found = score(verbatim_match(), [said, "x"], [gold, ("y", "x")])
    assert found.value == 50 * (value + 1)
    assert found.signature == "verbatim_match|norm:nfc,width,spaces|n:2|refs:3|scale:100"
