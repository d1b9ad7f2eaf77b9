"""A compiled model with an adapter: the same text, without a new graph per step."""

import pytest
import torch
from transformers import CompileConfig

from pema.adapter.config import AdapterConfig
from pema.adapter.module import Adapter
from pema.adapter.schedule import GradualUnrolling
from pema.generation.plugin import attach
from pema.owner.derivation import derive_head

torch_dynamo = pytest.importorskip("torch._dynamo")
SCHEDULE, OVERHEAD = GradualUnrolling(0.95), 2


def counting():
    """A backend that runs what it is given as it is, and what it was given; a function, which no settings copy."""
    given = []

    def backend(graph, _inputs):
        given.append(graph)
        return graph.forward

    return backend, given


@pytest.fixture
def parts(tiny_model):
    torch_dynamo.reset()
    model = tiny_model("llama", layers=1)
    model.generation_config.eos_token_id = None
    adapter = Adapter(AdapterConfig(d=32, vocabulary_size=320, rank=8), seed=1)
    torch.nn.init.normal_(adapter.B_pd, generator=torch.Generator().manual_seed(1))
    yield model, adapter, derive_head(model, "head_input")
    torch_dynamo.reset()


def greedy(model, ids, steps=8, **settings):
    return model.generate(ids, max_new_tokens=steps, do_sample=False, **settings)[0, ids.shape[1] :].tolist()


@pytest.mark.parametrize("compiled_before", [False, True])
def test_steps_of_a_static_cache_share_a_graph(parts, compiled_before):
    model, adapter, head = parts
    ids, (backend, graphs) = torch.arange(3, 12)[None], counting()
    config = CompileConfig(backend=backend, mode=None)
    config._compile_all_devices = True
    settings = {"cache_implementation": "static", "compile_config": config}
    plain = greedy(model, ids)
    if compiled_before:
        assert greedy(model, ids, **settings) == plain
    before = len(graphs)
    for _ in range(2):
        with attach(model, adapter, head, SCHEDULE, prompt_overhead_tokens=OVERHEAD):
            assert greedy(model, ids, **settings) == greedy(model, ids) != plain
        assert greedy(model, ids, **settings) == plain
    with_adapter = len(graphs) - before
    # torch 2.9 compiles again for each attachment; no version does for each of the 8 steps.
    assert 1 <= with_adapter <= 4
    with attach(model, adapter, head, SCHEDULE, prompt_overhead_tokens=OVERHEAD):
        assert greedy(model, ids + 7, **settings) == greedy(model, ids + 7)
    assert len(graphs) - before - with_adapter <= 2


def test_a_model_compiled_in_place(parts):
    model, adapter, head = parts
    ids = torch.arange(3, 12)[None]
    plain = greedy(model, ids, 2)
    with attach(model, adapter, head, SCHEDULE, prompt_overhead_tokens=OVERHEAD):
        expected = greedy(model, ids, 2)
    model.compile(backend=counting()[0])
    assert greedy(model, ids, 2) == plain
    with attach(model, adapter, head, SCHEDULE, prompt_overhead_tokens=OVERHEAD):
        assert greedy(model, ids, 2) == expected
    assert greedy(model, ids, 2) == plain


def test_one_graph_for_all_is_refused_by_name(parts):
    model, adapter, head = parts
    ids = torch.arange(3, 12)[None]
    with attach(model, adapter, head, SCHEDULE, prompt_overhead_tokens=OVERHEAD):
        whole = torch.compile(model.forward, backend=counting()[0], fullgraph=True)
        with pytest.raises(torch_dynamo.exc.Unsupported, match="the adapter of pema runs outside the graph"):
            whole(ids, logits_to_keep=1)
