"""Demonstrations in data: which, in which order, and as which turns."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.tiny import build_tokenizer

import pema
from pema.errors import ConfigError, DataError
from pema.tasks.demonstrations import DemonstrationTemplate, demonstrate
from pema.tasks.example import Example, Turn
from pema.tasks.registry import get_task
from pema.tasks.selection import Nearest
from pema.tasks.template import Template

CHAT = (
    "{% for m in messages %}<s>{{ m.role }}: {{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant: {% endif %}"
)
TEMPLATE = Template("Say: {source}")
POOL = (
    Example("red house", "Haus", alternatives=("rotes Haus",)),
    Example("red house", "another target"),
    Example("green tree", "Baum"),
    Example("red mouse", "Maus"),
    Example("talk", "reply", history=(Turn("user", "red house red house"), Turn("assistant", "yes"))),
)


def turns(*texts):
    return tuple(Turn(("user", "assistant")[i % 2], text) for i, text in enumerate(texts))


def test_the_most_similar_example_of_another_source_is_the_last():
    (found,) = demonstrate([Example("red house", "x", "file:1", alternatives=("y",))], POOL, 2, TEMPLATE)
    assert found.history == turns("Say: green tree", "Baum", "Say: red mouse", "Maus")
    assert (found.source, found.target, found.where, found.alternatives) == ("red house", "x", "file:1", ("y",))
    (new,) = demonstrate([Example("red house two", "")], POOL, 1, TEMPLATE)
    assert new.history == turns("Say: red house", "Haus")


def test_a_system_turn_stays_first_and_the_conversation_follows():
    own = (Turn("system", "Be kind."), Turn("user", "hello"), Turn("assistant", "hi"))
    (found,) = demonstrate([Example("red mice", "Mäuse", history=own)], POOL, 1, TEMPLATE)
    assert found.history == (own[0], *turns("Say: red mouse", "Maus"), *own[1:])


def test_few_other_sources_are_all_shown():
    (found,) = demonstrate([Example("red mouse", "x")], POOL, 100, TEMPLATE)
    assert len(found.history) == 4
    (alone,) = demonstrate([Example("red mouse", "x")], [Example("red mouse", "Maus")], 3, TEMPLATE)
    assert alone.history == ()


def test_what_cannot_be_is_refused():
    with pytest.raises(ConfigError, match="k=0 is too small"):
        demonstrate(POOL, POOL, 0, TEMPLATE)
    for pool in ((), POOL[4:]):
        with pytest.raises(DataError, match="no example of the pool can be a demonstration"):
            demonstrate(POOL, pool, 1, TEMPLATE)


def test_the_task_writes_the_turns():
    task = get_task("translation")
    assert demonstrate(POOL[:1], POOL, 1, task) == demonstrate(POOL[:1], POOL, 1, task.template)
    assert pema.demonstrate is demonstrate


SOURCES = st.text("abc ", min_size=1, max_size=6).filter(str.strip)


@given(st.lists(st.tuples(SOURCES, st.sampled_from("xyz")), min_size=1, max_size=8), st.integers(1, 4))
def test_no_example_is_shown_its_own_source(pairs, k):
    data = [Example(*pair) for pair in pairs]
    sources = {example.source for example in data}
    for example, found in zip(data, demonstrate(data, data, k, TEMPLATE), strict=True):
        shown = [turn.content for turn in found.history if turn.role == "user"]
        assert f"Say: {example.source}" not in shown
        assert len(shown) == len(set(shown)) == min(k, len(sources) - 1)


def test_prompts_equal_those_of_retrieved_few_shot_prompts():
    tokenizer = build_tokenizer()
    tokenizer.chat_template = CHAT
    pool = [POOL[0], POOL[2], POOL[3]]
    nearest = Nearest(pool)
    shown = DemonstrationTemplate(TEMPLATE.text, True, demonstrations=lambda source: nearest.select(source, 2))
    new = [Example("green house", "Haus"), Example("a mouse", "Maus")]
    assert TEMPLATE.encode(tokenizer, demonstrate(new, pool, 2, TEMPLATE)) == shown.encode(tokenizer, new)
