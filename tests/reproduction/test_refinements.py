"""Refinements of `best`: a merged adapter is the mean of its parts, and smoothing has the gradient of its loss."""

import pytest
import torch
from test_inversion import EXAMPLES, TASK

from pema.adapter import sampled
from pema.adapter.module import Adapter
from pema.adapter.optimisation import adapter_config
from pema.adapter.presets import preset
from pema.adapter.sampled import SampledCrossEntropy
from pema.memory.build import build_memory
from reproduction.experiments import refinements


@pytest.fixture(scope="module")
def memory(tiny_plm, tmp_path_factory):
    return build_memory(tiny_plm(), EXAMPLES * 4, TASK, tmp_path_factory.mktemp("refined") / "memory")


def test_a_merged_adapter_has_the_mean_of_all_h_pd_and_copies_as_the_first(memory):
    adapters = [Adapter(adapter_config(memory, preset("best", seed=seed)), None, seed=seed) for seed in range(3)]
    for adapter in adapters:
        torch.nn.init.normal_(adapter.B_pd)
    (batch,) = memory.view().batches(1 << 10)
    with torch.no_grad():
        one = refinements.merged(adapters)
        f = batch.representations
        torch.testing.assert_close(one(f), sum(each(f) for each in adapters) / 3, rtol=1e-4, atol=1e-4)
        context, W_hd = one.context(memory, batch.rows), memory.head().weight
        copied, expected = one.copy(f, context, W_hd), adapters[0].copy(f, context, W_hd)
        torch.testing.assert_close(copied.log_p(batch.targets), expected.log_p(batch.targets))


def test_label_smoothing_is_the_cross_entropy_with_smoothed_targets_and_has_its_gradient(memory, monkeypatch):
    monkeypatch.setattr(sampled, "SAMPLE", 8)
    head, core = memory.head(), memory.view().targets_seen()
    (batch,) = memory.view().batches(1 << 10)
    h = batch.representations.clone().requires_grad_()
    plain, smooth = (kind(head, core, 0).at(3) for kind in (SampledCrossEntropy, refinements.Smoothed))
    loss = smooth(h, batch.targets)
    (gradient,) = torch.autograd.grad(loss, h)
    x = head.logits(h)
    more = (x.gather(1, batch.targets[:, None])[:, 0] - x.mean(1)).mean()
    expected = plain(h, batch.targets) + refinements.SMOOTHING * more
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, h)[0])
