"""Generation from the cache of the prompts' common prefix, against generation without it."""

import logging

import pytest
import torch

import pema
from pema.adapter.config import AdapterConfig
from pema.adapter.module import Adapter
from pema.adapter.schedule import GradualUnrolling
from pema.generation.decoding import generate
from pema.owner.local import LocalPLM
from pema.owner.local import plm as local
from pema.owner.local.prefix import Prefix
from pema.tasks.registry import Task
from pema.tasks.template import Template
from tiny import FAMILIES, HYBRID_FAMILIES

SOURCES = ["the house", "a dog is here and the house is small", "the", "a dog", "the dog is small", "the house"]
SHORT = Task("test", Template("say {source}\nGerman:"), (), "")
LONG = Task("test", Template("the dog is small, the house is not: say {source}\nGerman:"), (), "")


@pytest.fixture(autouse=True)
def _always(monkeypatch):
    monkeypatch.setattr(local, "_LEAST_SAVED", 1)


def texts(plm, task=SHORT, adapter=None, schedule=None, **settings):
    return generate(plm, adapter, SOURCES, task, schedule, max_new_tokens=12, **settings)


@pytest.fixture
def slowly(monkeypatch):
    """The same call without the prefix."""

    def run(plm, **settings):
        with monkeypatch.context() as patch:
            patch.setattr(LocalPLM, "prompt_prefix", lambda self, prompts: None)
            return texts(plm, **settings)

    return run


@pytest.fixture
def columns(monkeypatch):
    """The shape of the tokens of every pass."""

    def record(plm):
        seen = []
        plm.model.get_input_embeddings().register_forward_pre_hook(lambda _m, args: seen.append(tuple(args[0].shape)))
        return seen

    return record


@pytest.mark.parametrize("family", [*FAMILIES, "phi3-longrope", *HYBRID_FAMILIES])
def test_every_family_generates_the_same(tiny_plm, slowly, family):
    plm = tiny_plm(family)
    for task in (SHORT, LONG):
        for batch_size in (6, 2):
            assert texts(plm, task, batch_size=batch_size) == slowly(plm, task=task, batch_size=batch_size)


@pytest.mark.parametrize("family", ["llama", "opt", "gpt2", "bloom", "qwen3"])
def test_the_prefix_runs_once_for_all_batches(tiny_plm, columns, family):
    plm = tiny_plm(family)
    texts(plm)
    seen = columns(plm)
    texts(plm, batch_size=3)
    prompts = [prompt.prompt for prompt in SHORT.template.encode_prompts(plm.tokenizer, SOURCES)]
    shared = local.common_prefix(prompts, min(map(len, prompts)) - 1)
    first = sorted(map(len, prompts), reverse=True)
    assert [shape for shape in seen if shape[1] > 1] == [(1, shared), (3, first[0] - shared), (3, first[3] - shared)]


def test_sliding_windows_take_a_prefix_within_the_window_only(tiny_plm, columns):
    plm = tiny_plm("mistral")
    for task, shared in ((SHORT, True), (LONG, False)):
        texts(plm, task)
        seen = columns(plm)
        texts(plm, task)
        prompts = [prompt.prompt for prompt in task.template.encode_prompts(plm.tokenizer, SOURCES)]
        assert (max(width for _, width in seen[1:]) < max(map(len, prompts))) == shared


@pytest.mark.parametrize(
    "settings",
    [
        {"num_beams": 3},
        {"do_sample": True, "seed": 4},
        {"repetition_penalty": 1.3},
        {"stop": ("e",)},
        {"use_cache": False},
        {"cache_implementation": "static"},
    ],
    ids=str,
)
def test_settings_of_generation(tiny_plm, slowly, settings):
    plm = tiny_plm()
    assert texts(plm, **settings) == slowly(plm, **settings)


@pytest.mark.parametrize("batch_size", [2, 6])
def test_with_an_adapter(tiny_plm, slowly, columns, batch_size):
    plm = tiny_plm()
    description = plm.description
    adapter = Adapter(AdapterConfig(description.d, description.vocabulary_size, rank=8, plm=description), seed=1)
    torch.nn.init.normal_(adapter.B_pd, generator=torch.Generator().manual_seed(1))
    given = {"adapter": adapter, "schedule": GradualUnrolling(0.9), "batch_size": batch_size}
    expected = slowly(plm, **given)
    assert texts(plm, **given) == expected != slowly(plm)
    opened, seen = pema.PLM(plm), columns(plm)
    with opened.use(given["adapter"], given["schedule"]):
        found = opened.generate(SOURCES, task=SHORT, max_new_tokens=12, batch_size=batch_size)
    assert found == expected
    assert seen[0][0] == 1 < seen[0][1]


def test_few_tokens_are_not_shared(tiny_plm, columns, monkeypatch):
    plm = tiny_plm()
    monkeypatch.setattr(local, "_LEAST_SAVED", 256)
    seen = columns(plm)
    texts(plm)
    assert plm.prompt_prefix([]) is None
    assert plm.prompt_prefix([[1, 2, 3]] * 127) is None
    assert plm.prompt_prefix([[1, 2, 3]] * 129).length == 2
    assert (1, 2) not in seen[:-1]
    assert pema.PLM(object()).prompt_prefix([[1, 2]]) is None


def test_a_prefix_that_computes_something_else_is_not_used(tiny_plm, slowly, monkeypatch, caplog):
    plm, right = tiny_plm(), Prefix.shifted

    def wrong(self, by):
        cache = right(self, by)
        for layer in cache.layers:
            layer.keys = layer.keys.flip(-1)
        return cache

    monkeypatch.setattr(Prefix, "shifted", wrong)
    with caplog.at_level(logging.WARNING, "pema"):
        assert texts(plm) == slowly(plm)
    assert "the shared prefix in `generate` is not used, it changes representations" in caplog.text


def test_half_precision(tiny_plm, slowly):
    plm = tiny_plm(dtype=torch.bfloat16)
    found, expected = texts(plm), slowly(plm)
    assert len(found) == len(expected) == 6
