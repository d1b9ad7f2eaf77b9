import json
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pema.errors import DataError
from pema.tasks.example import Example, Turn
from pema.tasks.readers import read_examples


def said(*turns):
    return [{"role": role, "content": content} for role, content in turns]


S, U, A, U2, A2 = ("system", "s"), ("user", "u"), ("assistant", "a"), ("user", "v"), ("assistant", "b")


def replies(turns, **row):
    """The examples of one conversation as (source, target, history), and the number of the turn of each."""
    examples = read_examples([{"messages": said(*turns), **row}])
    numbers = [int(each.where.removeprefix("data, row 0, turn ")) for each in examples]
    return [(each.source, each.target, [(t.role, t.content) for t in each.history]) for each in examples], numbers


@pytest.mark.parametrize(
    ("turns", "expected", "numbers"),
    [
        ([U, A], [("u", "a", [])], [2]),
        ([S, U, A], [("u", "a", [S])], [3]),
        ([S, U, A, U2, A2], [("u", "a", [S]), ("v", "b", [S, U, A])], [3, 5]),
        ([U, U2, A], [("v", "a", [U])], [3]),  # several turns of the user
        ([A, U, A2], [("u", "b", [A])], [3]),  # a greeting
        ([S, A, U, A2], [("u", "b", [S, A])], [4]),
        ([U, A, U2], [("u", "a", [])], [2]),  # the last question has no answer
        ([U, A, S, U2, A2], [("u", "a", []), ("v", "b", [U, A, S])], [2, 5]),
        ([("system", ""), U, A], [("u", "a", [("system", "")])], [3]),
    ],
)
def test_every_reply_is_an_example(turns, expected, numbers):
    assert replies(turns) == (expected, numbers)


def test_a_reply_with_weight_0_is_history():
    turns = said(U, A, U2, A2)
    turns[1]["weight"], turns[3]["weight"] = 0, 1
    (example,) = read_examples([{"messages": turns}])
    assert (example.source, example.target, len(example.history)) == ("v", "b", 2)


roles = st.sampled_from(["user", "assistant"])


@given(st.lists(st.tuples(roles, st.text(min_size=1).filter(str.strip).filter(lambda text: text.isascii()))))
def test_no_turn_is_lost(turns):
    """Every example is a beginning of the conversation, and every reply to the user is an example."""
    roles_of = [(a[0], b[0]) for a, b in pairwise(turns)]
    replied = [i for i, pair in enumerate(roles_of, start=1) if pair == ("user", "assistant")]
    first = next((i for i, turn in enumerate(turns) if turn[0] == "user"), len(turns))
    if ("assistant", "assistant") in roles_of[first:] or not replied:
        with pytest.raises(DataError, match=r"a reply must follow a turn of the user|there is no reply to learn from"):
            replies(turns)
        return
    examples, numbers = replies(turns)
    assert numbers == [i + 1 for i in replied]
    for (source, target, history), number in zip(examples, numbers, strict=True):
        assert [*history, ("user", source), ("assistant", target)] == turns[:number]


def test_sharegpt_and_other_names(tmp_path):
    turns = [{"from": "human", "value": "u"}, {"from": "gpt", "value": "a"}]
    row = {"system": "s", "conversations": turns, "tools": ""}
    path = tmp_path / "d.jsonl"
    path.write_text("\n\n" + json.dumps(row))
    assert read_examples(path) == [Example("u", "a", f"{path}:3, turn 3", (Turn("system", "s"),))]
    developer = said(("developer", "s"), ("user", "u"), ("model", "a"))
    assert read_examples([{"conversations": developer}])[0].history == (Turn("system", "s"),)
    parts = [{"type": "text", "text": "u"}, {"type": "text", "text": "!"}]
    spoken = [
        {"role": "user", "content": parts, "name": "Ann"},
        {"role": "assistant", "content": "a", "tool_calls": None},
    ]
    assert read_examples([{"messages": spoken, "tools": []}])[0].source == "u!"


def spoken(**changes):
    return [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a", **changes}]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"messages": said(U, A, A2)},
            r"turn 3: a reply must follow a turn of the user, but turn 2 has the role 'as",
        ),
        (
            {"messages": said(U, S, A)},
            r"turn 3: a reply must follow a turn of the user, but turn 2 has the role 'sy",
        ),
        ({"messages": said(U)}, r"row 0: there is no reply to learn from \(the roles are 'user'\)"),
        ({"messages": said(A)}, r"row 0: there is no reply to learn from \(the roles are 'assistant'\)"),
        ({"messages": []}, r"row 0: there is no reply to learn from \(the roles are nothing\)"),
        ({"messages": spoken(weight=0)}, r"row 0: there is no reply to learn from .* weight that is not 0"),
        ({"messages": spoken(weight=0.5)}, r"turn 2: weight 0\.5 must be 0 \(do not learn this reply\) or 1"),
        ({"messages": spoken(content="")}, r"turn 2: 'content' is blank"),
        ({"messages": spoken(content=None)}, r"turn 2: 'content' is missing"),
        ({"messages": said(("user", " "), A)}, r"turn 1: 'content' is blank"),
        ({"messages": said(("system", None), U, A)}, r"turn 1: 'content' is missing"),
        (
            {"messages": said(("tool", "4"), A)},
            r"turn 1 is one of a tool \(role 'tool'\)\. pema reads",
        ),
        (
            {"conversations": [{"from": "function_call", "value": "f"}]},
            r"turn 1 is one of a tool \(from 'function",
        ),
        ({"messages": said(("bot", "a"))}, r"turn 1: unknown role 'bot': use system, developer, user"),
        ({"messages": said((["user"], "a"))}, r"turn 1: unknown role \['user'\]"),
        ({"messages": spoken(content=None, tool_calls=[{}])}, r"turn 2 contains 'tool_calls'\. pema reads"),
        ({"messages": spoken(function_call={"name": "f"})}, r"turn 2 contains 'function_call'"),
        ({"messages": spoken(reasoning_content="...")}, r"turn 2 contains 'reasoning_content'"),
        ({"messages": spoken(content=[{"type": "image_url"}])}, r"turn 2 contains a part of type 'image_url'"),
        ({"messages": spoken(content=["a"])}, r"turn 2 contains a part of type 'str'"),
        ({"messages": spoken(), "tools": [{"type": "function"}]}, r"row 0: 'tools' is not supported"),
        ({"messages": spoken(), "images": ["a.png"]}, r"row 0: 'images' is not supported"),
        ({"messages": "u"}, r"row 0: 'messages' is a str, not a list of turns such as \["),
        ({"messages": ["u", "a"]}, r"row 0, turn 1 is a str, not an object with 'role' and 'content'"),
        ({"messages": [{"text": "u"}]}, r"turn 1 has no 'role' \(or 'from'\); it contains 'text'"),
        ({"conversations": spoken(), "system": 7.5, "id": 1}, None),
    ],
)
def test_conversations_that_cannot_be_read(row, message):
    if message is None:
        assert read_examples([row])[0].history == (Turn("system", "7.5"),)
        return
    with pytest.raises(DataError, match=message):
        read_examples([row])
