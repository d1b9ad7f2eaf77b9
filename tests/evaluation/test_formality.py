import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pema.errors import ConfigError, DataError
from pema.evaluation.formality import FormalityAccuracy, phrases, strip_marks
from pema.evaluation.score import score

FORMAL = ["[F]Haben Sie[/F] Zeit?", "Wie geht es [F]Ihnen[/F]?", "[F]Ihr[/F] Hund und [F]Ihre[/F] Katze", "Guten Tag!"]
INFORMAL = ["[F]Hast du[/F] Zeit?", "Wie geht es [F]dir[/F]?", "[F]dein[/F] Hund und [F]deine[/F] Katze", "Guten Tag!"]


@pytest.mark.parametrize(
    ("hypothesis", "line", "tokens", "words", "substring"),
    [
        ("Haben Sie heute Zeit?", 0, "formal", "formal", "formal"),
        ("Sie haben Zeit", 0, "neither", "neither", "neither"),
        ("Wann Sie Zeit Haben", 0, "formal", "neither", "neither"),
        ("du Hast", 0, "informal", "neither", "neither"),
        ("Ist Zeit?", 0, "neither", "neither", "neither"),
        ("Was fehlt Ihnen?", 1, "neither", "formal", "formal"),
        ("Was fehlt Ihnen nun", 1, "formal", "formal", "formal"),
        ("Was fehlt dir und Ihnen nun", 1, "both", "both", "both"),
        ("direkt", 1, "neither", "neither", "informal"),
        ("Ihre Katze", 2, "formal", "formal", "formal"),
        ("deine Katze, Ihre.", 2, "informal", "both", "both"),
        ("ihr Hund", 2, "neither", "neither", "neither"),
        ("Haben Sie Guten Tag", 3, "neither", "neither", "neither"),
    ],
)
def test_labels(hypothesis, line, tokens, words, substring):
    for matching, expected in (("tokens", tokens), ("words", words), ("substring", substring)):
        metric = FormalityAccuracy(FORMAL, INFORMAL, matching=matching)
        hypotheses = [""] * 4
        hypotheses[line] = hypothesis
        assert metric.labels(hypotheses)[line] == expected


@pytest.mark.parametrize("matching", ["tokens", "words", "substring"])
def test_composed_and_decomposed_letters_are_the_same(matching):
    metric = FormalityAccuracy(["[F]können[/F] Sie"], ["[F]ko\u0308nnt[/F] ihr"], matching=matching)
    assert metric.labels(["wir ko\u0308nnen es"]) == ["formal"]
    assert metric.labels(["wir könnt es"]) == ["informal"]


def test_scripts_without_spaces_match_by_substring():
    metric = FormalityAccuracy(["これは本[F]です[/F]。"], ["これは本[F]だ[/F]。"])
    assert metric.matching == "substring"
    assert metric.labels(["それは本です。"]) == ["formal"]
    assert FormalityAccuracy(["これは本[F]です[/F]。"], ["これは本[F]だ[/F]。"], matching="tokens").matching == "tokens"
    assert FormalityAccuracy(FORMAL, INFORMAL).matching == "tokens"


def test_a_word_ends_after_its_marks():
    metric = FormalityAccuracy(["[F]आप[/F]"], ["[F]तुम[/F]"], matching="words")
    assert metric.labels(["तुमे"]) == metric.labels(["आपका"]) == ["neither"]
    assert metric.labels(["तुमे, तुम।"]) == ["informal"]


def test_accuracy_leaves_out_neither_and_both():
    hypotheses = ["Haben Sie Zeit", "dir", "Ihr und dein", "Guten Tag"]
    found = score(FormalityAccuracy(FORMAL, INFORMAL), hypotheses, hypotheses)
    assert found.value == 0.5
    assert found.texts == 2  # of four
    assert found.signature == "M-ACC|matching:tokens|case:mixed|formal:1|informal:1|neither:1|both:1"


def test_the_references_themselves():
    formal, informal = ([strip_marks(text) for text in side] for side in (FORMAL, INFORMAL))
    metric = FormalityAccuracy(FORMAL, INFORMAL, matching="words")
    assert score(metric, formal, formal).value == 1.0
    assert score(metric, informal, informal).value == 0.0
    nothing = score(metric, ["x"] * 4, formal)
    assert nothing.value == 0.0
    assert "formal:0|informal:0|neither:4" in nothing.signature


vocabulary = ["Sie", "du", "Ihnen", "dir", "haben", "hast", "Ihr,"]
texts = st.lists(st.sampled_from(vocabulary), max_size=6).map(" ".join)
marked = st.lists(st.sampled_from(vocabulary), min_size=1, max_size=2).map(lambda found: f"[F]{' '.join(found)}[/F] x")


@given(rows=st.lists(st.tuples(texts, marked, marked), min_size=1, max_size=8))
def test_tokens_equal_the_official_definition(rows):
    hypotheses, formal, informal = zip(*rows, strict=True)
    counts = {"FORMAL": 0, "INFORMAL": 0, "OTHER": 0}
    for hypothesis, *references in rows:
        hits = []
        for reference in references:
            inside = re.findall(r"\[F\](.*?)\[/F\]", reference)
            hits.append([p for p in inside if all(token in hypothesis.split(" ") for token in p.split(" "))])
        label = "FORMAL" if hits[0] and not hits[1] else "INFORMAL" if hits[1] and not hits[0] else "OTHER"
        counts[label] += 1
    matched = counts["FORMAL"] + counts["INFORMAL"]
    expected = counts["FORMAL"] / matched if matched else 0
    assert score(FormalityAccuracy(formal, informal), hypotheses, hypotheses).value == expected


def test_marks():
    assert phrases("[F]Haben Sie[/F] und [F] Ihr [/F]") == ["Haben Sie", "Ihr"]
    assert phrases("nichts") == []
    assert strip_marks("[F]Haben Sie[/F] Zeit?") == "Haben Sie Zeit?"


@pytest.mark.parametrize("text", ["[F]Sie", "Sie[/F]", "[F][F]Sie[/F][/F]", "[/F]Sie[F]"])
def test_marks_that_are_not_balanced(text):
    with pytest.raises(DataError, match=r"line 3: the marks \[F\] and \[/F\] are not balanced"):
        phrases(text, "line 3")


@pytest.mark.parametrize("text", ["[F][/F]", "[F] [/F]", "[F]Sie\n[/F]"])
def test_blank_phrases(text):
    with pytest.raises(DataError, match="reference: a marked phrase is blank"):
        phrases(text)


def test_references_that_cannot_be_used():
    with pytest.raises(ConfigError, match="unknown matching 'fuzzy': use tokens, words or substring"):
        FormalityAccuracy(FORMAL, INFORMAL, matching="fuzzy")
    with pytest.raises(DataError, match="not aligned: 4 formal, 3 informal"):
        FormalityAccuracy(FORMAL, INFORMAL[:3])
    with pytest.raises(DataError, match=r"no phrase is marked \[F\]\.\.\.\[/F\] in the informal references"):
        FormalityAccuracy(FORMAL, [strip_marks(text) for text in INFORMAL])
    with pytest.raises(DataError, match="informal reference 2: the marks"):
        FormalityAccuracy(FORMAL, [INFORMAL[0], "[F]dir", *INFORMAL[2:]])
    with pytest.raises(DataError, match="not aligned: 1 hypotheses, 4 annotated_references"):
        FormalityAccuracy(FORMAL, INFORMAL).labels(["x"])
