"""Adapters that read a middle layer: the states are those of the contexts, and the additions begin at zero."""

import pytest
import torch
from test_inversion import EXAMPLES, TASK

from pema.adapter import sampled
from pema.adapter.presets import preset
from pema.memory.build import build_memory
from reproduction.experiments import middle_layer


@pytest.fixture(scope="module")
def plm(tiny_plm):
    return tiny_plm()


@pytest.fixture(scope="module")
def memory(plm, tmp_path_factory):
    return build_memory(plm, EXAMPLES * 8, TASK, tmp_path_factory.mktemp("middle") / "memory", contexts="teacher")


@pytest.fixture(scope="module")
def data(plm, memory):
    return middle_layer.texts(plm.generator.model, memory, (1, plm.generator.model.config.num_hidden_layers))


def test_the_last_layer_of_each_pair_is_what_the_memory_stores(plm, data):
    last = plm.generator.model.config.num_hidden_layers
    assert len(data) == 24
    for text in data:
        states = text.states[last][-len(text.rows) :].float()
        assert torch.nn.functional.cosine_similarity(states, text.f).min() > 0.999


@pytest.mark.parametrize("kind", [middle_layer.SamePosition, middle_layer.AllPositions])
def test_additions_begin_at_zero_and_a_text_does_not_see_the_others_or_what_follows(kind, data):
    torch.manual_seed(0)
    more = kind(data[0].f.shape[1]).eval()
    states, pairs = [text.states[1] for text in data[:3]], [len(text.rows) for text in data[:3]]
    assert not more(states, pairs).any()
    torch.nn.init.normal_(more.write.weight)
    together = more(states, pairs).split(pairs)
    for one, n, among in zip(states, pairs, together, strict=True):
        torch.testing.assert_close(more([one], [n]), among)
        torch.testing.assert_close(more([one[:-1]], [n - 1]), among[:-1])


def test_training_lowers_the_loss_of_texts_it_has_seen(memory, data, monkeypatch):
    monkeypatch.setattr(sampled, "SAMPLE", 64)
    torch.manual_seed(0)
    config = preset("best", epochs=3, vocabulary="sampled", seed=0, learning_rate=3e-3)
    training = middle_layer.Training(memory, memory, config, middle_layer.SamePosition(memory.d))
    before = training.measure(data, 1)
    losses = training.run(data, data, 1)
    assert losses[-1] < before - 0.1
