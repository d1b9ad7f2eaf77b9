import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pema.errors import ConfigError
from pema.tasks.example import Example, Turn
from pema.tasks.held_out import draw_held_out, sources_of

fractions = st.floats(0.01, 0.99)
seeds = st.integers(0, 2**32 - 1)


@given(st.integers(2, 60), fractions, seeds)
def test_a_split_holds_out_the_fraction(examples, fraction, seed):
    train, held_out = draw_held_out(examples, fraction, seed, "it")
    assert sorted([*train, *held_out]) == list(range(examples))
    assert len(held_out) == min(max(round(examples * fraction), 1), examples - 1)
    alone = draw_held_out(examples, fraction, seed, "it", np.arange(examples)[::-1] * 7 - 3)
    assert all(np.array_equal(a, b) for a, b in zip((train, held_out), alone, strict=True))


@given(st.lists(st.integers(-3, 9), min_size=2, max_size=60).filter(lambda each: len(set(each)) > 1), fractions, seeds)
def test_a_source_is_never_split(sources, fraction, seed):
    sources = np.array(sources)
    train, held_out = draw_held_out(len(sources), fraction, seed, "it", sources)
    assert sorted([*train, *held_out]) == list(range(len(sources)))
    assert len(train)
    assert len(held_out)
    assert list(train) == sorted(train)
    assert not set(sources[train]) & set(sources[held_out])
    # No more than needed: without its last source, fewer than the fraction would be held out.
    sizes = [np.sum(sources == source) for source in set(sources[held_out])]
    assert len(sizes) == 1 or len(held_out) - max(sizes) < max(round(len(sources) * fraction), 1)


texts = st.sampled_from(["", "a", "b", "\ud800", "[]"])
examples = st.builds(
    Example,
    texts,
    st.text(max_size=1),
    history=st.lists(st.builds(Turn, st.sampled_from(["user", "assistant"]), texts), max_size=2).map(tuple),
)


@settings(deadline=None)
@given(st.lists(examples, max_size=9))
def test_examples_of_one_source_have_one_number(given_examples):
    keys = [(each.source, each.history) for each in given_examples]
    numbers = sources_of(given_examples)
    if len(set(keys)) == len(keys):
        assert numbers is None
        return
    assert [keys.index(key) for key in keys] == [list(numbers).index(number) for number in numbers]


def test_splits_that_are_impossible():
    with pytest.raises(ConfigError, match="it contains 1 example: a split needs at least two"):
        draw_held_out(1, 0.5, 0, "it")
    with pytest.raises(ConfigError, match="it contains 3 examples of one source: a split needs at least two sources"):
        draw_held_out(3, 0.5, 0, "it", np.zeros(3, np.int64))
