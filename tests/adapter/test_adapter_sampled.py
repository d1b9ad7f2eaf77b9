"""Training with sampled tokens: an unbiased normaliser, and an adapter over the whole vocabulary."""

import pytest
import torch
from made_memories import make_head, make_memory, rows

from pema.adapter.config import CORE, SAMPLE, TrainConfig
from pema.adapter.presets import preset
from pema.adapter.sampled import SampledCrossEntropy, frequent
from pema.adapter.training import train

D, V = 7, 29
TOKENS = torch.tensor([2, 3, 11, 20, 28])
OTHERS = torch.tensor([j for j in range(V) if j not in TOKENS])
HEADS = {
    "plain": {},
    "scaled bias": {"scale": 3.0, "bias": True},
    "soft cap": {"soft_cap": 1.5},
    "all": {"soft_cap": 2.0, "scale": 2.0, "bias": True},
}


@pytest.fixture
def sample(monkeypatch):
    def size(n):
        monkeypatch.setattr("pema.adapter.sampled.SAMPLE", n)
        monkeypatch.setattr("pema.adapter.config.SAMPLE", n)
        monkeypatch.setattr("pema.adapter.training.SAMPLE", n)

    return size


def batch(n, seed=0):
    random = torch.Generator().manual_seed(seed)
    return torch.randn(n, D, generator=random), TOKENS[torch.randint(0, len(TOKENS), (n,), generator=random)]


def drawn(cross_entropy, head):
    """The tokens of a step's sample, by their rows of W_hd."""
    return torch.cdist(cross_entropy.W_hd[len(TOKENS) :], head.weight).argmin(1)


@pytest.mark.parametrize("kind", HEADS)
def test_the_mean_of_the_normaliser_over_all_samples_is_the_exact_one(kind, sample):
    sample(1)
    head, (h, y) = make_head(D, V, **HEADS[kind]), batch(1)
    exact = head.logits(h)[0].double()
    normalisers = {}
    cross_entropy = SampledCrossEntropy(head, TOKENS, 0)
    for step in range(400):
        loss = cross_entropy.at(step)(h, y)
        normalisers[int(drawn(cross_entropy, head))] = float((loss + exact[y[0]]).double().exp())
    assert sorted(normalisers) == OTHERS.tolist()  # each of the others, and none of the seen
    assert sum(normalisers.values()) / len(normalisers) == pytest.approx(float(exact.exp().sum()), rel=1e-5)


@pytest.mark.parametrize("kind", HEADS)
def test_loss_and_gradient_are_autograds(kind, sample):
    sample(6)
    head, (h, y) = make_head(D, V, **HEADS[kind]), batch(9)
    cross_entropy = SampledCrossEntropy(head, TOKENS, 3).at(5)
    mine, other = h.clone().requires_grad_(), h.clone().requires_grad_()
    logits = head.logits(other)
    weighted = torch.cat((logits[:, TOKENS], logits[:, drawn(cross_entropy, head)] + torch.tensor(24 / 6).log()), 1)
    expected = (weighted.logsumexp(1) - logits.gather(1, y[:, None])[:, 0]).mean()
    loss = cross_entropy(mine, y)
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    loss.backward()
    expected.backward()
    torch.testing.assert_close(mine.grad, other.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", HEADS)
def test_a_target_outside_of_the_core_has_its_own_term(kind, sample):
    """The mean of the normaliser over all pairs of drawn tokens that a step can have is the exact one."""
    sample(1)
    head, (h, _) = make_head(D, V, **HEADS[kind]), batch(1)
    exact = head.logits(h)[0].double()
    y = OTHERS[4:5]
    cross_entropy = SampledCrossEntropy(head, TOKENS, 0, complete=False)
    normalisers = {}
    for step in range(400):
        loss = cross_entropy.at(step)(h, y)
        normalisers[int(drawn(cross_entropy, head))] = float((loss + exact[y[0]]).double().exp())
    # A sample of nothing but the target says nothing about the others.
    assert normalisers.pop(int(y)) == pytest.approx(float(exact[TOKENS].exp().sum() + exact[y[0]].exp()), rel=1e-5)
    assert len(normalisers) == len(OTHERS) - 1
    assert sum(normalisers.values()) / len(normalisers) == pytest.approx(float(exact.exp().sum()), rel=1e-5)


@pytest.mark.parametrize("kind", HEADS)
def test_loss_and_gradient_with_targets_outside_of_the_core_are_autograds(kind, sample):
    sample(6)
    head, (h, y) = make_head(D, V, **HEADS[kind]), batch(9)
    cross_entropy = SampledCrossEntropy(head, TOKENS, 3, complete=False).at(5)
    tokens = drawn(cross_entropy, head)
    y[:4] = torch.stack([OTHERS[0], OTHERS[7], tokens[2], tokens[5]])
    mine, other = h.clone().requires_grad_(), h.clone().requires_grad_()
    logits = head.logits(other)
    expected = []
    for x, target in zip(logits, y, strict=True):
        others = len(OTHERS) - (target not in TOKENS)
        kept = [j for j in tokens.tolist() if j != target]
        terms = [x[TOKENS].exp().sum(), others / len(kept) * x[kept].exp().sum()]
        terms += [] if target in TOKENS else [x[target].exp()]
        expected.append(torch.stack(terms).sum().log() - x[target])
    loss = cross_entropy(mine, y)
    assert float(loss.detach()) == pytest.approx(float(torch.stack(expected).mean().detach()), rel=1e-5)
    torch.testing.assert_close(cross_entropy.each(h, y), torch.stack(expected).detach(), rtol=1e-5, atol=1e-5)
    loss.backward()
    torch.stack(expected).mean().backward()
    torch.testing.assert_close(mine.grad, other.grad, rtol=1e-4, atol=1e-6)


def test_the_core_holds_the_most_frequent_tokens(monkeypatch):
    counts = torch.tensor([0, 5, 1, 0, 5, 9, 2])
    assert frequent(counts).tolist() == [1, 2, 4, 5, 6]
    monkeypatch.setattr("pema.adapter.sampled.CORE", 3)
    assert frequent(counts).tolist() == [1, 4, 5]


def test_training_with_a_small_core_teaches_rare_tokens_too(tmp_path, sample, monkeypatch):
    sample(8)
    memory = make_memory(tmp_path / "memory", examples=120, used=9)
    settings = {"epochs": 25, "batch_size": 64, "learning_rate": 1e-2, "precision": "float32"}
    _, exact = train(memory, preset("residual", vocabulary="full", **settings), tmp_path / "exact")
    monkeypatch.setattr("pema.adapter.sampled.CORE", 3)
    _, figures = train(memory, preset("residual", vocabulary="sampled", **settings), tmp_path / "adapter")
    assert figures["held_out_cross_entropy"] == pytest.approx(exact["held_out_cross_entropy"], rel=0.1)


def test_a_sample_depends_on_seed_and_step_alone(sample):
    sample(12)
    head = make_head(D, V)
    one, again = SampledCrossEntropy(head, TOKENS, 1), SampledCrossEntropy(head, TOKENS, 1)
    first = drawn(one.at(4), head)
    assert not torch.equal(drawn(one.at(5), head), first)
    assert torch.equal(drawn(again.at(4), head), first)
    assert not torch.equal(drawn(SampledCrossEntropy(head, TOKENS, 2).at(4), head), first)


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bfloat16", [False, True])
def test_a_head_in_half_precision(stored, bfloat16, sample):
    sample(4)
    head, (h, y) = make_head(D, V, bias=True), batch(20)
    half = SampledCrossEntropy(head.to(stored), TOKENS, 0, bfloat16=bfloat16).at(0)
    whole = SampledCrossEntropy(make_head(D, V, bias=True), TOKENS, 0).at(0)
    assert float(half(h, y)) == pytest.approx(float(whole(h, y)), rel=0.02)


@pytest.mark.parametrize("name", ["paper", "residual"])
def test_training_teaches_and_the_adapter_covers_all_tokens(name, tmp_path, sample):
    sample(8)
    memory = make_memory(tmp_path / "memory", examples=120, used=9)
    settings = {"epochs": 25, "batch_size": 64, "learning_rate": 1e-2, "precision": "float32"}
    adapter, figures = train(memory, preset(name, vocabulary="sampled", **settings), tmp_path / "adapter")
    _, exact = train(memory, preset(name, vocabulary="full", **settings), tmp_path / "exact")
    assert adapter.config.vocabulary == "full"
    assert adapter.tokens is None
    assert adapter.config.training["settings"]["vocabulary"] == "sampled"
    _, held_out = memory.split(0.1, 0)
    f, y = rows(held_out)
    log_p = adapter.log_probs(f, memory.head())
    torch.testing.assert_close(log_p.exp().sum(-1), torch.ones(len(f)))
    # What is measured on held-out pairs is exact, and as good as with all tokens.
    loss = -float(log_p[torch.arange(len(y)), y].mean())
    assert figures["held_out_cross_entropy"] == pytest.approx(loss, rel=1e-4)
    assert loss == pytest.approx(exact["held_out_cross_entropy"], rel=0.1)


def test_a_resumed_run_draws_the_samples_of_an_unbroken_one(tmp_path, sample, monkeypatch):
    from pema.adapter.joint import JointRun

    sample(8)
    memory = make_memory(tmp_path / "memory", examples=60, used=9)
    config = preset("residual", vocabulary="sampled", epochs=3, batch_size=32, checkpoint_every=1)
    whole, _ = train(memory, config, tmp_path / "whole")
    step = JointRun.step

    def stop(self, *given):
        if self.state.step == 7:
            raise KeyboardInterrupt
        return step(self, *given)

    with monkeypatch.context() as patch:
        patch.setattr(JointRun, "step", stop)
        with pytest.raises(KeyboardInterrupt):
            train(memory, config, tmp_path / "broken")
    resumed, _ = train(memory, config, tmp_path / "broken", resume=True)
    assert torch.equal(resumed.A, whole.A)
    assert torch.equal(resumed.B_pd, whole.B_pd)


@pytest.mark.parametrize(
    ("vocabulary", "size", "seen", "chosen"),
    [
        ("auto", 49_152, 703, "sampled"),
        ("auto", 4 * (SAMPLE + 703), 703, "sampled"),
        ("auto", 4 * (SAMPLE + 703) - 1, 703, "full"),
        ("auto", 4 * (SAMPLE + CORE), 4 * SAMPLE + CORE, "sampled"),
        ("auto", 4 * (SAMPLE + CORE) - 1, CORE, "full"),
        ("auto", 8192, 1, "full"),
        ("sampled", 8192, 1, "sampled"),
        ("sampled", 2000, 100, "full"),
        ("full", 262_144, 100, "full"),
        ("seen", 262_144, 100, "seen"),
    ],
)
def test_auto_samples_where_it_pays(vocabulary, size, seen, chosen):
    assert TrainConfig(vocabulary=vocabulary).with_vocabulary(size, seen).vocabulary == chosen


def test_the_preset_best_samples_from_a_large_vocabulary(tmp_path, sample, capsys):
    sample(2)
    memory = make_memory(tmp_path / "memory", used=3)
    adapter, _ = train(memory, preset("residual", epochs=1), tmp_path / "adapter")
    said = "vocabulary='sampled': each step's softmax has 3 of the 3 tokens that occur, and 2 drawn of the others"
    assert said in " ".join(capsys.readouterr().err.split())
    assert adapter.config.training["settings"]["vocabulary"] == "sampled"
    # The paper's preset is the paper's.
    assert preset("paper").vocabulary == "full"
