"""The cost of storage in fewer bits, with outliers as in representations of large PLMs."""

import math
from dataclasses import replace

import pytest
import torch
from fake_plm import FakePLM, build, files, some_examples

from pema.errors import ConfigError
from pema.memory import precision
from pema.memory.precision import MOST, StorageLoss
from pema.memory.shard import channel_scales_of, restore, store
from pema.owner.head import Head


def perplexity(head, f, targets):
    return math.exp(torch.nn.functional.cross_entropy(head(f), targets).item())


def made(outliers, *, n=3000, d=64, V=200, factor=1000.0, seed=0):
    """Representations with outliers in some components, a head that reads them all, and the targets that it expects.

    The head's weights are as much smaller there, as behind the norms of OPT and Llama, so every component matters.
    """
    random = torch.Generator().manual_seed(seed)
    size = torch.ones(d)
    size[:outliers] = torch.logspace(2, math.log10(factor), outliers) if outliers else size[:outliers]
    f = (torch.randn(n, d, generator=random) + (torch.arange(d) < outliers) * 2) * size
    head = Head(torch.randn(V, d, generator=random) * 0.5 / size)
    targets = torch.distributions.Categorical(logits=head(f)).sample()
    return f, head, targets


def by_row(f):
    """int8 with one scale a row alone."""
    scales = f.abs().amax(1, keepdim=True) / 127
    return (f / scales).round() * scales


def stored(f, dtype):
    channels = channel_scales_of(f) if dtype == "int8" else None
    return restore(*store(f, dtype, str, channels), channels)


@pytest.mark.parametrize("dtype", ["int8", "float16", "bfloat16"])
@pytest.mark.parametrize("outliers", [0, 1, 6])
def test_outliers_keep_within_a_percent(outliers, dtype):
    torch.manual_seed(1)
    f, head, targets = made(outliers)
    exact = perplexity(head, f, targets)
    assert perplexity(head, stored(f, dtype), targets) == pytest.approx(exact, rel=MOST)
    loss = StorageLoss(head, dtype)
    loss.add(f, stored(f, dtype), targets)
    assert loss.rise < MOST
    if outliers:  # what one scale a row alone would make of them
        assert perplexity(head, by_row(f), targets) > 1.5 * exact
        with pytest.raises(ConfigError, match=r"dtype='int8' loses too much .* rises by [\d.]+%, more than 1%. Build"):
            StorageLoss(head, "int8").add(f, by_row(f), targets)


@pytest.mark.parametrize("seed", range(3))
def test_the_rise_is_that_of_all_pairs(seed, monkeypatch):
    monkeypatch.setattr(precision, "FIRST", 10**6)
    monkeypatch.setattr(precision, "MOST", 10.0)
    torch.manual_seed(seed)
    f, head, targets = made(2, seed=seed)
    worse = f + 0.3 * torch.randn(f.shape) * f.square().mean(0).sqrt()
    loss = StorageLoss(head, "int8")
    loss.add(f, worse, targets)
    assert loss.pairs == len(f)
    exact, read = torch.log_softmax(head(f), -1), torch.log_softmax(head(worse), -1)
    divergence = (exact.exp() * (exact - read)).sum(1).mean().item()
    gold = (exact - read).gather(1, targets[:, None])[:, 0]
    low = gold.mean().item() - 2 * gold.std(correction=0).item() / math.sqrt(len(f))
    assert loss.rise == pytest.approx(math.expm1(max(divergence, low)), rel=1e-4)
    # The targets are what the head expects, so the two agree to their error.
    assert 1 + loss.rise == pytest.approx(perplexity(head, worse, targets) / perplexity(head, f, targets), rel=0.1)


def test_what_is_stored_exactly_costs_nothing():
    f, head, targets = made(3)
    for kind, dtype in ((torch.float16, "float16"), (torch.float16, "float32"), (torch.bfloat16, "bfloat16")):
        loss = StorageLoss(head, dtype)
        loss.add(f.clamp(-6e4, 6e4).to(kind), f * math.nan, targets)
        assert loss.pairs == 0


def outlier_plm(factor=1000.0, weight=1.0):
    """A PLM of which component 3 is `factor` times as large, and its head's weights as much smaller there."""

    def change(answer, sequence):
        f = answer.representations.clone()
        f[:, 3] *= factor
        return type(answer)(answer.index, f, answer.generated)

    plm = FakePLM(change=change)
    W = plm.head().weight.clone() * weight
    W[:, 3] /= factor
    plm._head = Head(W)
    plm.description = replace(plm.description, head_fingerprint=plm._head.fingerprint)
    return plm


def test_a_build_with_outliers_keeps_what_the_plm_predicts(tmp_path):
    exact = build(tmp_path / "exact", 60, plm=outlier_plm(), dtype="float32")
    int8 = build(tmp_path / "int8", 60, plm=outlier_plm(), dtype="int8")
    head = exact.head()
    (a,), (b,) = exact.view().batches(10_000), int8.view().batches(10_000)
    assert a.representations.abs().max() > 1000
    logits = head(a.representations), head(b.representations)
    assert (logits[0] - logits[1]).abs().max() < 0.1
    assert (head(by_row(a.representations)) - logits[0]).abs().max() > 1
    # Shards share the scales of the first, whoever reads them together.
    assert len({shard.channel_scales.numpy().tobytes() for shard in int8.shards}) == 1
    assert int8._channel_scales[0].shape == (1, 8)


def test_a_build_that_would_lose_too_much_is_refused_with_the_remedy(tmp_path):
    plm = outlier_plm(weight=5000.0)  # so sure of its tokens that a small error in f changes them
    words = r"dtype='int8' loses .* perplexity rises by .* Build with dtype float16, bfloat16 or float32"
    with pytest.raises(ConfigError, match=words):
        build(tmp_path / "m", 60, plm=plm, dtype="int8")
    assert build(tmp_path / "wide", 60, plm=plm, dtype="float16").examples == 60


def test_a_value_beyond_float16_is_refused_and_int8_holds_it(tmp_path):
    plm = outlier_plm(factor=1e6)
    with pytest.raises(ConfigError, match=r"more than the maximum of float16 \(6.55e\+04\): use dtype bfloat16, int8"):
        build(tmp_path / "m", 60, plm=plm)
    exact = build(tmp_path / "exact", 60, plm=plm, dtype="float32")
    int8 = build(tmp_path / "int8", 60, plm=plm, dtype="int8")
    (a,), (b,) = exact.view().batches(10_000), int8.view().batches(10_000)
    assert (exact.head()(a.representations) - exact.head()(b.representations)).abs().max() < 0.1


def test_memories_with_other_scales_are_merged_and_read_together(tmp_path):
    from pema.memory.merge import merge
    from pema.memory.sample import sample

    first, second = some_examples(20), some_examples(20, seed=1)
    build(tmp_path / "a", first, dtype="int8")
    build(tmp_path / "b", second, dtype="int8")
    both = merge([tmp_path / "a", tmp_path / "b"], tmp_path / "c")
    (exact,) = build(tmp_path / "exact", first + second, dtype="float32").view().batches(10_000)
    assert both._channel_scales[0].shape == (2, 8)
    for seed in (None, 5):
        total = 0
        for batch in both.view().batches(64, shuffle_seed=seed):
            distance = torch.cdist(batch.representations.double(), exact.representations.double()).min(1).values
            assert distance.max() < 0.05
            total += len(batch.targets)
        assert total == both.pairs
    drawn = sample(tmp_path / "c", tmp_path / "s", 100, seed=1)
    for batch in drawn.view().batches(1000):
        assert torch.cdist(batch.representations.double(), exact.representations.double()).min(1).values.max() < 0.05


def test_appending_keeps_the_scales(tmp_path):
    build(tmp_path / "m", some_examples(20), dtype="int8")
    grown = build(tmp_path / "m", some_examples(20, seed=1), dtype="int8", append=True)
    assert grown._channel_scales[0].shape == (1, 8)
    assert files(tmp_path / "m")
