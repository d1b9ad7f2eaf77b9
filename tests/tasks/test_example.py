import json
from dataclasses import replace

import pandas
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pema.errors import ConfigError, DataError
from pema.tasks.example import Example, Turn, one_target_each
from pema.tasks.readers import read_examples

turns = st.builds(Turn, st.sampled_from(["system", "user", "assistant"]), st.text())
examples = st.builds(
    Example,
    st.text(),
    st.text(),
    history=st.lists(turns, max_size=3).map(tuple),
    alternatives=st.lists(st.text(), max_size=3).map(tuple),
)


@given(examples)
def test_an_example_survives_json(example):
    assert Example.of_list(json.loads(json.dumps(example.to_list()))) == example
    assert Example.of_list(replace(example, where="a:1").to_list()) == example


@given(st.lists(examples.filter(lambda each: all(text.strip() for text in (each.source, *each.references)))))
def test_examples_are_read_from_their_rows(given_examples):
    spoken = [each for each in given_examples if all(turn.content.strip() for turn in each.history)]
    if spoken:
        rows = [each.to_row(several=True) for each in spoken]
        assert [replace(each, where="") for each in read_examples(rows)] == spoken
    for each in spoken:
        if not each.alternatives:
            assert [replace(each, where="data, row 0")] == read_examples([each.to_row()])


def test_a_plain_example_is_a_pair():
    assert Example("a", "b", "f:1").to_list() == ["a", "b"]


@given(st.lists(examples))
def test_every_target_becomes_an_example(given_examples):
    expected = [
        Example(each.source, target, each.where, each.history)
        for each in given_examples
        for target in [each.target, *each.alternatives]
    ]
    assert list(one_target_each(given_examples)) == expected
    assert [each.target for each in expected] == [target for each in given_examples for target in each.references]


@pytest.mark.parametrize("data", [["text"], [{"source": "a", "target": "b"}], pandas.DataFrame({"source": ["a"]})])
def test_other_rows_than_examples(data):
    with pytest.raises(DataError, match=r"example 1 is of type .*: read the data with pema\.read_examples\(data\)"):
        list(one_target_each(data))


def test_a_role_that_is_none():
    with pytest.raises(ConfigError, match=r"role.*'bot'.*system.*user.*assistant"):
        Turn("bot", "Hello!")
