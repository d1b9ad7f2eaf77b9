"""The end of texts: stop strings and token limits, for each row independently."""

import dataclasses

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pema.adapter.config import AdapterConfig
from pema.adapter.module import Adapter
from pema.adapter.schedule import Constant, NoAdapter
from pema.errors import ConfigError
from pema.generation.batches import plain
from pema.generation.decoding import decode, generate, generate_counted
from pema.generation.texts import StopStrings, TokenLimits, stopped
from pema.owner.session_model import SessionModel
from pema.tasks.registry import Task
from pema.tasks.template import Template

TASK = Task("test", Template("say {source}\nGerman:"), (), "")
SOURCES = ["the house", "a dog is here and the house is small", "the dog is small", "a"]


@pytest.fixture(scope="module")
def plm(tiny_plm):
    return tiny_plm("llama")


@pytest.fixture(scope="module")
def adapter(plm):
    config = AdapterConfig(d=32, vocabulary_size=plm.head().vocabulary_size, rank=8, plm=plm.description)
    adapter = Adapter(config)
    with torch.no_grad():
        adapter.B_pd.copy_(0.5 * torch.randn(32, 8, generator=torch.Generator().manual_seed(1)))
    return adapter


def ids(plm, text):
    return plm.tokenizer(text, add_special_tokens=False)["input_ids"]


def obvious(text, stop):
    """The text before the first stop string after its leading white space; None if there is none."""
    start = len(text) - len(text.lstrip())
    places = [place for place in range(start, len(text)) if any(text.startswith(each, place) for each in stop)]
    return text[: places[0]].strip() if places else None


words = st.text(st.sampled_from("ab \n日é😀"), max_size=12)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=words, stop=st.lists(words.filter(len), min_size=1, max_size=3))
def test_the_first_stop_string_of_any_text(plm, text, stop):
    tokens = ids(plm, text)
    result, ended = stopped(plm.tokenizer, tokens, stop), None
    for n in range(1, len(tokens) + 1):
        ended = obvious(plm.tokenizer.decode(tokens[:n]), stop)
        if ended is not None:
            break
    assert (result and result[1]) == ended
    assert (ended is None) == (obvious(text, stop) is None)
    # The criterion ends the row at the token that completes the stop string, and not before.
    criterion = StopStrings(plm.tokenizer, 2, stop)
    ends = [bool(criterion(torch.tensor([[7, 7, *tokens[:n]]]), None)) for n in range(1, len(tokens) + 1)]
    assert (ends.index(True) + 1 if any(ends) else None) == (result and result[0])


def test_a_stop_string_inside_of_tokens(plm):
    tokens = [*ids(plm, "the dog"), *ids(plm, " is")]
    assert any(len(plm.tokenizer.decode([token])) > 2 for token in tokens)
    for stop, expected in (("e d", "th"), ("h", "t"), ("g i", "the do"), ("the", ""), ("x", None)):
        result = stopped(plm.tokenizer, tokens, [stop])
        assert (result and result[1]) == expected


def test_a_control_token_is_a_stop_string_by_its_name(plm):
    end = plm.tokenizer.eos_token
    tokens = [*ids(plm, "the dog"), plm.tokenizer.eos_token_id, *ids(plm, " is")]
    count = len(ids(plm, "the dog"))
    assert stopped(plm.tokenizer, tokens, [end]) == (count + 1, "the dog")
    assert stopped(plm.tokenizer, tokens, [f"g{end} "])[1] == "the do"
    assert stopped(plm.tokenizer, tokens, [" is"])[1] == "the dog"


@pytest.mark.parametrize("with_adapter", [False, True])
def test_texts_are_the_whole_ones_up_to_the_stop_string(plm, adapter, with_adapter):
    used = adapter if with_adapter else None
    whole = generate(plm, used, SOURCES, TASK, Constant(0.5), max_new_tokens=30)
    counts = generate_counted(plm, used, SOURCES, TASK, Constant(0.5), max_new_tokens=30)
    stops = {text[k : k + n] for text in whole for k in (2, 7, 9) for n in (1, 2)}
    stops = sorted(stop for stop in stops if stop.strip() and stop.isprintable() and "\ufffd" not in stop)
    assert len(stops) > 3
    for stop in stops:
        for batch_size in (1, 3, 4):
            result = generate_counted(
                plm, used, SOURCES, TASK, Constant(0.5), max_new_tokens=30, stop=[stop], batch_size=batch_size
            )
            expected = [obvious(text, [stop]) for text in whole]
            assert result.texts == [
                before if before is not None else text for before, text in zip(expected, whole, strict=True)
            ]
            assert [reason == "stop_string" for reason in result.finish_reasons] == [e is not None for e in expected]
            assert result.stopped == sum(each is not None for each in expected) >= 1
            assert result.tokens < counts.tokens
            assert result.cut == result.finish_reasons.count("length")


@pytest.mark.parametrize("given", [{}, {"num_beams": 3}, {"num_beams": 3, "early_stopping": True}], ids=str)
def test_stop_strings_in_a_session_with_beams_and_alone(plm, given):
    (whole, *_) = generate(plm, None, SOURCES, TASK, max_new_tokens=20, **given)
    given = given | {"max_new_tokens": 20, "stop": [whole[3:5], "e"]}
    together = generate(plm, None, SOURCES, TASK, **given)
    assert together == [generate(plm, None, [source], TASK, **given)[0] for source in SOURCES]
    assert together == decode(plm, SessionModel(plm), SOURCES, TASK, plain, **given).texts
    assert not any(stop in text for text in together for stop in given["stop"])
    assert together != generate(plm, None, SOURCES, TASK, **given | {"stop": []})


def test_a_plm_without_an_end_of_sequence_token_stops_too(plm):
    whole = generate(plm, None, SOURCES, TASK, max_new_tokens=12, eos_token_id=None)
    result = generate_counted(plm, None, SOURCES, TASK, max_new_tokens=12, eos_token_id=None, stop=[whole[0][2]])
    assert result.texts == [text if (e := obvious(text, [whole[0][2]])) is None else e for text in whole]
    assert result.finish_reasons[0] == "stop_string"


def test_the_adapters_limit_and_stop_strings_apply_where_none_are_given(plm, adapter):
    whole = generate(plm, adapter, SOURCES, TASK, Constant(0.5), max_new_tokens=9)
    own = Adapter(dataclasses.replace(adapter.config, max_new_tokens=9, stop=(whole[0][2],)))
    own.load_state_dict(adapter.state_dict())
    texts = generate(plm, own, SOURCES, TASK, Constant(0.5))
    assert texts == generate(plm, adapter, SOURCES, TASK, Constant(0.5), max_new_tokens=9, stop=own.config.stop)
    assert texts[0] == whole[0][:2].strip()
    assert generate(plm, own, SOURCES, TASK, Constant(0.5), stop=()) == whole
    longer = generate(plm, own, SOURCES, TASK, Constant(0.5), stop=(), max_new_tokens=12)
    assert [a != b and a.startswith(b.rstrip("\ufffd")) for a, b in zip(longer, whole, strict=True)] == [True] * 4
    # The PLM alone with the adapter's ending, for comparison.
    assert generate(plm, own, SOURCES, TASK, NoAdapter(), stop=None, max_new_tokens=None) == generate(
        plm, None, SOURCES, TASK, max_new_tokens=9, stop=own.config.stop
    )


def test_an_adapter_without_a_limit_has_the_former_one(plm, adapter):
    (prompt,) = TASK.template.encode_prompts(plm.tokenizer, SOURCES[:1])
    assert adapter.config.max_new_tokens is None
    result = generate_counted(plm, adapter, SOURCES[:1], TASK, Constant(0.5), eos_token_id=None)
    assert result.tokens == 2 * prompt.source_length + 16
    assert result.finish_reasons == ["length"]


def test_rows_end_at_their_own_limits():
    criterion = TokenLimits(3, torch.tensor([1, 4]))
    assert criterion(torch.zeros(2, 4), None).tolist() == [True, False]
    # The beams of an item are adjacent.
    assert criterion(torch.zeros(4, 6), None).tolist() == [True, True, False, False]
    assert criterion(torch.zeros(4, 7), None).tolist() == [True] * 4


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"stop": "x"}, "stop='x' must be a list"),
        ({"stop": [""]}, r"stop\[0\]='' is empty: give a text, or leave it out"),
        ({"stop": [3]}, r"stop\[0\]=3 must be a text"),
        (
            {"stop_strings": ["x"]},
            "stop_strings is not a setting of pema.generate: give stop, which ends a text before",
        ),
        ({"stops": ["x"]}, r"stops.*did you mean 'stop'\?"),
    ],
)
def test_what_is_no_stop_string_is_refused(plm, settings, message):
    with pytest.raises(ConfigError, match=message):
        generate(plm, None, SOURCES, TASK, **settings)
