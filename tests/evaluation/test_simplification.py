import pytest
from hypothesis import given
from hypothesis import strategies as st

from pema.errors import ConfigError, DataError
from pema.evaluation.evaluate import evaluate, get_metric
from pema.evaluation.score import score
from pema.evaluation.simplification import sari_of
from pema.tasks.registry import get_task

SOURCE = "About 95 species are currently accepted ."
REFERENCES = (
    "About 95 species are currently known .",
    "About 95 species are now accepted .",
    "95 species are now accepted .",
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("About 95 you now get in .", 26.82782411698074),
        ("About 95 species are now agreed .", 58.89995423074248),
        ("About 95 species are currently agreed .", 50.71608864657479),
    ],
)
def test_values_of_the_authors_script(text, expected):
    found = score(get_metric("sari", sources=[SOURCE]), [text], [REFERENCES])
    assert found.value == pytest.approx(expected)
    assert found.signature == "SARI|case:lc|tok:13a|mean:texts|n:1|refs:3|scale:100"


def test_a_corpus_is_the_mean_over_its_texts():
    texts = ["About 95 you now get in .", "About 95 species are now agreed ."]
    task = get_task("style")
    found = evaluate(task, texts, [REFERENCES] * 2, sources=[SOURCE] * 2, metrics=["sari"])["sari"]
    assert found.value == pytest.approx((26.82782411698074 + 58.89995423074248) / 2)


words = st.lists(st.sampled_from("abcd"), max_size=6)


@given(words, words, st.lists(words, min_size=1, max_size=3))
def test_it_lies_between_0_and_1_and_depends_on_no_order_of_references(source, text, references):
    value = sari_of(source, text, references)
    assert 0 <= value <= 1 + 1e-12
    assert sari_of(source, text, references[::-1]) == pytest.approx(value)
    assert sari_of(source, text, [*references, *references]) == pytest.approx(value)


def test_a_text_that_equals_the_only_reference_keeps_adds_and_deletes_rightly():
    assert sari_of(list("abcde"), list("vwxyz"), [list("vwxyz")]) == pytest.approx(2 / 3)
    assert sari_of(list("abcdef"), list("abcdxyzw"), [list("abcdxyzw")]) == pytest.approx(1.0)


def test_errors():
    with pytest.raises(ConfigError, match="sari compares texts with their sources: give the sources"):
        get_metric("sari")
    with pytest.raises(DataError, match="not aligned: 1 hypotheses, 2 sources"):
        get_metric("sari", sources=["a", "b"]).statistics(["a"], ["a"])
