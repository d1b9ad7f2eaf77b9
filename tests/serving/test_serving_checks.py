"""What the checks let through, the PLM answers; what they refuse is said with its number."""

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pema.serving.checks import Checks
from pema.serving.policy import Limits
from pema.serving.refusal import Refusal

few = settings(max_examples=40, deadline=None)
token = st.integers(0, 325)
sequences = st.lists(st.lists(token, max_size=20) | st.just([5] * 128), min_size=1, max_size=4)


@pytest.fixture
def checks(plm):
    return Checks(plm.description, Limits(batch_sequences=3, batch_tokens=200, session_rows=4))


def accepted(check, *arguments):
    """What a check returns; None where it refuses what the PLM cannot do."""
    try:
        return check(*arguments)
    except Refusal as refused:
        if refused.status != 422:
            raise
        return None


@few
@given(sequences, st.lists(st.integers(0, 20), min_size=1, max_size=4))
def test_accepted_teacher_contexts_are_answered(plm, asked, starts):
    tokens = accepted(Checks(plm.description, Limits()).represent, asked, starts)
    if tokens is not None:
        assert tokens == sum(map(len, asked))
        assert len(list(plm.represent(asked, starts))) == len(asked)


@few
@given(sequences, st.lists(st.sampled_from([0, 3, 8, 16, 120]), min_size=1, max_size=4))
def test_accepted_predicted_contexts_are_answered(plm, asked, steps):
    tokens = accepted(Checks(plm.description, Limits()).predict, asked, steps)
    if tokens is not None:
        assert tokens == sum(map(len, asked)) + sum(steps)
        assert len(list(plm.predict(asked, steps))) == len(asked)


@few
@given(sequences, st.lists(st.tuples(token, st.integers(0, 4)), min_size=1, max_size=5), st.booleans())
def test_accepted_sessions_and_steps_are_answered(plm, asked, step, identity):
    checks = Checks(plm.description, Limits())
    tokens = [word for word, _ in step]
    parents = None if identity else [row for _, row in step]
    if accepted(checks.prompts, asked) is not None:
        session = plm.open_session(asked)
        lengths = accepted(checks.step, tokens, parents, [len(prompt) for prompt in asked])
        if lengths is not None:
            session.advance(tokens, parents)
            assert len(session.representations) == len(lengths)


@pytest.mark.parametrize(
    ("what", "arguments", "status", "message"),
    [
        ("represent", ([[1, 2]], [1, 1]), 422, "sequences has 1 entries, starts 2"),
        ("represent", ([[1, 2]], [2]), 422, r"sequences\[0\] has 2 tokens and starts\[0\] is 2"),
        ("represent", ([[1, 2], [3, 4]], [1, 0]), 422, r"starts\[1\] is 0"),
        ("represent", ([[1, 320]], [1]), 422, r"sequences\[0\] contains token 320, the vocabulary ends at 319"),
        ("represent", ([[1] * 129], [1]), 422, r"sequences\[0\] has 129 tokens, the maximum of a context is 128"),
        ("represent", ([[1, 2]] * 4, [1] * 4), 413, "4 sequences are sent, 3 are allowed"),
        ("represent", ([[1] * 101] * 2, [1] * 2), 413, "202 tokens are requested, 200 are allowed"),
        ("predict", ([[1]], [8, 8]), 422, "prompts has 1 entries, steps 2"),
        ("predict", ([[]], [8]), 422, r"prompts\[0\] has 0 tokens"),
        ("predict", ([[1]], [0]), 422, r"steps\[0\] is 0"),
        ("predict", ([[1]], [7]), 422, r"steps\[0\] is 7: an exact number would reveal the length of a target"),
        ("predict", ([[1] * 121], [8]), 422, r"prompts\[0\] with its steps has 129 tokens"),
        ("predict", ([[1] * 5] * 3, [64] * 3), 413, "207 tokens are requested"),
        ("prompts", ([[1], []],), 422, r"prompts\[1\] is empty"),
        ("prompts", ([[1] * 128],), 422, r"prompts\[0\] with one more token has 129"),
        ("prompts", ([[1]] * 5,), 413, "would have 5 rows, 4 are allowed"),
        ("step", ([1], None, [3, 3]), 422, "tokens has 1 entries, the session 2 rows"),
        ("step", ([1], [0, 1], [3, 3]), 422, "tokens has 1 entries, parents 2"),
        ("step", ([1], [2], [3, 3]), 422, "parents names row 2, the session has 2"),
        ("step", ([400], [0], [3, 3]), 422, "tokens contains token 400"),
        ("step", ([1, 1], [0, 1], [3, 128]), 422, "row 1 has 129 tokens"),
        ("step", ([1] * 5, [0] * 5, [3]), 413, "would have 5 rows"),
    ],
)
def test_refusals(checks, what, arguments, status, message):
    with pytest.raises(Refusal, match=message) as caught:
        getattr(checks, what)(*arguments)
    assert caught.value.status == status


def test_steps_may_fill_the_window_that_the_server_allows(plm):
    assert Checks(plm.description, Limits()).predict([[1] * 117], [11]) == 128
    small = Checks(plm.description, Limits(sequence_tokens=30))
    assert small.window == 30
    assert small.predict([[1] * 19], [11]) == 30
    assert Checks(plm.description, Limits(batch_tokens=40)).window == 40
    assert Checks(dataclasses.replace(plm.description, max_length=20), Limits(sequence_tokens=30)).window == 20
