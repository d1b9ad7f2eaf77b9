import threading
from dataclasses import replace

import pytest
import torch
from transformers import GenerationConfig, LogitsProcessor, StoppingCriteria, WatermarkingConfig

from pema.adapter.config import AdapterConfig
from pema.adapter.module import Adapter
from pema.adapter.schedule import Constant, NoAdapter
from pema.errors import ConfigError, MismatchError
from pema.generation.batches import plain
from pema.generation.decoding import decode, generate, generate_counted
from pema.generation.settings import HONOURED, REFUSED, without_own_settings
from pema.owner.session_model import SessionModel
from pema.tasks.registry import Task
from pema.tasks.template import Template

TASK = Task("test", Template("say {source}\nGerman:"), (), "")
SOURCES = ["the house", "a dog is here and the house is small", "the dog is small"]


@pytest.fixture(scope="module")
def plm(tiny_plm):
    return tiny_plm("llama")


@pytest.fixture(scope="module")
def ends(plm):
    """Tokens that end the greedy texts of this random PLM in their middle."""
    texts = generate(plm, None, SOURCES, TASK, NoAdapter())
    middles = plm.tokenizer([text[9:12] for text in texts], add_special_tokens=False)["input_ids"]
    return [*plm.description.eos_token_ids, *(ids[-1] for ids in middles)]


@pytest.fixture(scope="module")
def adapter(plm):
    adapter = Adapter(AdapterConfig(d=32, vocabulary_size=plm.head().vocabulary_size, rank=8, plm=plm.description))
    with torch.no_grad():
        adapter.B_pd.copy_(0.5 * torch.randn(32, 8, generator=torch.Generator().manual_seed(1)))
    return adapter


def elsewhere(plm, sources, **settings):
    """What the data owner's side makes of a PLM that it reaches by sessions only."""
    return decode(plm, SessionModel(plm), sources, TASK, plain, **settings).texts


# What a PLM's folder may bring; every other field gets 7, which no default equals.
BROUGHT = {
    "do_sample": True,
    "num_beams": 3,
    "num_return_sequences": 2,
    "early_stopping": "never",
    "temperature": 0.3,
    "repetition_penalty": 1.9,
    "length_penalty": -2.0,
    "no_repeat_ngram_size": 1,
    "bad_words_ids": [[i] for i in range(3, 200)],
    "suppress_tokens": list(range(3, 200)),
    "begin_suppress_tokens": list(range(3, 200)),
    "sequence_bias": [[[i], -50.0] for i in range(3, 200)],
    "forced_bos_token_id": 5,
    "forced_eos_token_id": 5,
    "exponential_decay_length_penalty": (1, 3.0),
    "eos_token_id": list(range(3, 320)),
    "stop_strings": ["e", "a"],
    "guidance_scale": 3.0,
    "watermarking_config": WatermarkingConfig(bias=9.0),
    "return_dict_in_generate": True,
    "output_scores": True,
    "use_cache": False,
    "cache_implementation": "static",
    "max_time": 1e-9,
    "min_new_tokens": 60,
    "prompt_lookup_num_tokens": 3,
}


def texts_of_every_kind(plm, adapter, ends):
    few = {"max_new_tokens": 8}
    return [
        generate(plm, None, SOURCES[:2], TASK, NoAdapter(), eos_token_id=ends, **few),
        generate(plm, adapter, SOURCES[:2], TASK, Constant(0.5), **few),
        generate(plm, None, SOURCES[:2], TASK, NoAdapter(), do_sample=True, seed=1, **few),
        generate(plm, None, SOURCES[:2], TASK, NoAdapter(), num_beams=3, eos_token_id=ends, **few),
    ]


@pytest.fixture(scope="module")
def usual(plm, adapter, ends):
    return texts_of_every_kind(plm, adapter, ends)


@pytest.mark.parametrize("field", sorted(vars(GenerationConfig())))
def test_settings_of_the_plms_folder_do_not_count(plm, adapter, ends, usual, field):
    before = plm.model.generation_config
    brought = plm.model.generation_config = GenerationConfig()
    setattr(brought, field, BROUGHT.get(field, 7))
    try:
        assert texts_of_every_kind(plm, adapter, ends) == usual
        assert plm.model.generation_config is brought
    finally:
        plm.model.generation_config = before


CHOSEN = {
    "bad_words_ids": [[i] for i in range(60, 120)],
    "begin_suppress_tokens": list(range(3, 200)),
    "exponential_decay_length_penalty": (2, 3.0),
    "min_new_tokens": 25,
    "no_repeat_ngram_size": 2,
    "repetition_penalty": 1.8,
    "sequence_bias": {(i,): -50.0 for i in range(60, 120)},
    "suppress_tokens": list(range(60, 120)),
    "watermarking_config": WatermarkingConfig(bias=9.0),
    "renormalize_logits": True,
    "remove_invalid_values": True,
    "use_cache": False,
    "max_time": 1e6,
}
SAMPLED = {
    "temperature": 0.5,
    "top_k": 3,
    "top_p": 0.4,
    "min_p": 0.3,
    "typical_p": 0.3,
    "epsilon_cutoff": 0.02,
    "eta_cutoff": 0.03,
    "top_h": 0.3,
}
BEAMS = {"length_penalty": -3.0, "early_stopping": True}
CASES = [
    *({name: value} for name, value in CHOSEN.items()),
    *({name: value, "do_sample": True} for name, value in SAMPLED.items()),
    *({name: value, "num_beams": 3} for name, value in BEAMS.items()),
]
SAME = {"renormalize_logits", "remove_invalid_values", "use_cache", "max_time", "early_stopping"}
"""Settings that change nothing here."""


@pytest.mark.parametrize("given", CASES, ids=lambda given: next(iter(given)))
def test_settings_of_the_user_count_here_and_elsewhere_alone_and_together(plm, ends, given):
    name = next(iter(given))
    # With more ends, beams of several lengths compete.
    given = {**given, "eos_token_id": ends if "num_beams" not in given else list(range(2, 320, 20))}
    if not hasattr(GenerationConfig(), name):
        pytest.skip(f"this transformers has no {name}")
    others = {key: value for key, value in given.items() if key != name}
    texts = generate(plm, None, SOURCES, TASK, NoAdapter(), **given)
    assert (texts == generate(plm, None, SOURCES, TASK, NoAdapter(), **others)) == (name in SAME)
    if "do_sample" not in given:
        assert texts == [generate(plm, None, [source], TASK, NoAdapter(), **given)[0] for source in SOURCES]
        assert texts == elsewhere(plm, SOURCES, **given)


def test_every_setting_that_is_honoured_is_tried():
    tried = {*CHOSEN, *SAMPLED, *BEAMS, "do_sample", "num_beams", "eos_token_id"}
    assert HONOURED - tried == {"cache_config", "cache_implementation", "compile_config", "disable_compile"}


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_settings_that_cannot_be_meant_are_refused(plm, name):
    with pytest.raises(ConfigError, match=rf"{name} is not a setting of pema\.generate: \w+"):
        generate(plm, None, SOURCES, TASK, NoAdapter(), **{name: 1})


def test_every_field_of_generation_is_honoured_or_refused_by_name(plm):
    ours = {"max_new_tokens", "max_length"}
    for name in vars(GenerationConfig()).keys() - HONOURED - REFUSED.keys() - ours:
        with pytest.raises(ConfigError, match=rf"unknown setting '{name}' of pema\.generate"):
            generate(plm, None, SOURCES, TASK, NoAdapter(), **{name: 1})


class Missing(LogitsProcessor):
    """Needs a package that is not there, as a quantised cache does."""

    def __call__(self, input_ids, scores):
        raise ImportError("pip install it")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"temprature": 0.5}, r"unknown setting 'temprature' of pema\.generate: did you mean 'temperature'\?"),
        ({"temperature": 0.5}, "temperature has no effect without do_sample=True: give both, or neither"),
        ({"length_penalty": 2.0}, "length_penalty has no effect without num_beams=2 or more"),
        ({"num_beams": "3"}, "num_beams='3' must be a whole number"),
        ({"num_beams": True}, "num_beams=True must be a whole number"),
        ({"max_new_tokens": 2.5}, r"max_new_tokens=2\.5 must be a whole number"),
        ({"cache_implementation": "paged"}, "cache_implementation='paged' forms its own batches"),
        ({"cache_implementation": "mine"}, "the model cannot generate with .*cache_implementation='mine'"),
        ({"logits_processor": [Missing()]}, "the model cannot generate with .*logits_processor=.*: pip install it"),
        ({"eos_token_id": "</s>"}, "eos_token_id must be a token id, or a list of token ids, not '</s>'"),
        ({"eos_token_id": [2, -1]}, r"eos_token_id must be a token id, or a list of token ids, not \[2, -1\]"),
        ({"logits_processor": Missing()}, "logits_processor must be a list, not a Missing"),
        ({"stopping_criteria": "x"}, "stopping_criteria must be a list, not a str"),
        ({"sequence_bias": 3}, "the model cannot generate with .*sequence_bias=3"),
    ],
)
def test_settings_that_are_wrong_are_refused(plm, given, message):
    with pytest.raises(ConfigError, match=message):
        generate(plm, None, SOURCES, TASK, NoAdapter(), **given)


class Only(LogitsProcessor):
    """Allows one token alone."""

    def __init__(self, token):
        self.token = token

    def __call__(self, input_ids, scores):
        allowed = torch.full_like(scores, -torch.inf)
        allowed[:, self.token] = 0.0
        return allowed


class After(StoppingCriteria):
    """Stops a row once it holds a token."""

    def __init__(self, token):
        self.token = token

    def __call__(self, input_ids, scores, **_):
        return (input_ids == self.token).any(1)


def test_logits_processors_and_stopping_criteria_of_the_user(plm, adapter):
    (token,) = plm.tokenizer("z", add_special_tokens=False)["input_ids"]
    for one in (None, adapter):
        found = generate(plm, one, SOURCES, TASK, Constant(0.5), logits_processor=[Only(token)], max_new_tokens=4)
        assert found == ["zzzz"] * 3
        stop = [After(token)]
        found = generate_counted(
            plm, one, SOURCES, TASK, Constant(0.5), logits_processor=[Only(token)], stopping_criteria=stop
        )
        assert (found.texts, found.tokens, found.cut) == (["z"] * 3, 3, 0)
    assert elsewhere(plm, SOURCES, logits_processor=[Only(token)], stopping_criteria=[After(token)]) == ["z"] * 3


def test_what_stops_waits_for_the_others(plm):
    usual = generate(plm, None, SOURCES, TASK, NoAdapter(), max_new_tokens=12)
    last = usual[1][3]
    found = generate(plm, None, SOURCES, TASK, NoAdapter(), max_new_tokens=12, stop=[last])
    assert found == [text.split(last)[0].strip() for text in usual]
    assert len(found[1]) < len(usual[1])


def test_a_plm_without_an_end_cannot_stop_by_other_means(plm):
    with pytest.raises(ConfigError, match="stopping_criteria: the PLM has no end-of-sequence token"):
        generate(plm, None, SOURCES, TASK, NoAdapter(), eos_token_id=None, stopping_criteria=[After(3)])


def test_draws_are_from_the_whole_mixture(plm):
    drawn = generate(plm, None, SOURCES, TASK, NoAdapter(), do_sample=True, seed=3, temperature=1.0, top_k=0)
    assert generate(plm, None, SOURCES, TASK, NoAdapter(), do_sample=True, seed=3) == drawn


def test_threads_do_not_change_a_models_settings(plm):
    own, inside = plm.model.generation_config, threading.Barrier(2)

    def use(order):
        with without_own_settings(plm.model):
            inside.wait()
            assert plm.model.generation_config.to_dict() == GenerationConfig().to_dict()
            order.wait(0.2)

    first, second = (threading.Thread(target=use, args=[threading.Event()]) for _ in range(2))
    first.start()
    second.start()
    first.join()
    second.join()
    assert plm.model.generation_config is own
    with pytest.raises(ZeroDivisionError), without_own_settings(plm.model):
        raise ZeroDivisionError
    assert plm.model.generation_config is own


def test_an_adapter_generates_with_its_own_task_and_template_only(plm, adapter):
    taught = Adapter(replace(adapter.config, task=TASK.name, template=TASK.template.text))
    taught.load_state_dict(adapter.state_dict())
    assert generate(plm, taught, SOURCES, TASK, Constant(0.5)) == generate(plm, adapter, SOURCES, TASK, Constant(0.5))
    other = replace(TASK, template=Template("English: {source} German:"))
    with pytest.raises(
        MismatchError,
        match=r"trained with the template 'say \{source\}\\nGerman:', not with 'English: \{source\} German:': generate "
        r"with its own \(pema\.get_task\('test', 'say",
    ):
        generate(plm, taught, SOURCES, other, Constant(0.5))
    with pytest.raises(MismatchError, match=r"trained with the task 'test', not with 'style': .*neither --task nor"):
        generate(plm, taught, SOURCES, replace(TASK, name="style"), Constant(0.5))
    assert generate(plm, None, SOURCES, other, NoAdapter())
