import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from made_memories import make_head

from pema.adapter.config import AdapterConfig
from pema.adapter.dropout import Dropout
from pema.adapter.loss import LEAST_ROWS, CrossEntropy, JointLoss
from pema.adapter.module import Adapter
from pema.errors import AdapterError

D, V = 7, 23
HEADS = {
    "plain": {},
    "bias": {"bias": True},
    "scale": {"scale": 0.25},
    "scaled bias": {"scale": 3.0, "bias": True},
    "soft cap": {"soft_cap": 1.5},
    "all": {"soft_cap": 2.0, "scale": 2.0, "bias": True},
}


def batch(n, seed=0, spread=3.0):
    random = torch.Generator().manual_seed(seed)
    return torch.randn(n, D, generator=random) * spread, torch.randint(0, V, (n,), generator=random)


@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("n", [1, LEAST_ROWS - 1, LEAST_ROWS, 3 * LEAST_ROWS + 5])
def test_cross_entropy_and_its_gradient_are_autograds(kind, n):
    head = make_head(D, V, **HEADS[kind])
    h, y = batch(n)
    mine, theirs = h.clone().requires_grad_(), h.double().clone().requires_grad_()
    chunked = CrossEntropy(head, chunk_bytes=1)
    assert chunked.rows == LEAST_ROWS
    loss = chunked(mine, y)
    raw = theirs @ head.weight.double().T
    raw = (raw if head.bias is None else raw + head.bias.double()) * head.scale
    logits = raw if head.soft_cap is None else head.soft_cap * torch.tanh(raw / head.soft_cap)
    expected = torch.nn.functional.cross_entropy(logits, y)
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-5, abs=1e-6)
    (3 * loss).backward()
    (3 * expected).backward()
    assert torch.allclose(mine.grad.double(), theirs.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", HEADS)
def test_one_kernel_for_the_loss_and_its_gradient_is_the_same(kind, monkeypatch):
    def losses_of(logits, targets, bias, soft_cap):
        """What the kernel does, by autograd."""
        with torch.enable_grad():
            x = logits.detach().float().requires_grad_()
            raw = x if bias is None else x + bias
            raw = raw if soft_cap is None else soft_cap * torch.tanh(raw / soft_cap)
            losses = torch.nn.functional.cross_entropy(raw, targets, reduction="none")
            losses.sum().backward()
        logits.copy_(x.grad)
        return losses.detach()

    head = make_head(D, V, **HEADS[kind])
    h, y = batch(2 * LEAST_ROWS + 5)
    weights = torch.rand(len(y))
    separate, fused = (CrossEntropy(head, bfloat16=True, chunk_bytes=1) for _ in range(2))
    assert not separate.is_fused
    monkeypatch.setattr("pema.adapter.loss.losses_of", losses_of)
    monkeypatch.setattr("pema.adapter.loss.is_usable", lambda device: True)
    assert fused.is_fused
    results = []
    for cross_entropy in (separate, fused):
        mine = h.clone().requires_grad_()
        loss = cross_entropy(mine, y, weights)
        loss.backward()
        results.append((loss.detach(), mine.grad, cross_entropy.each(h, y)))
    for one, other in zip(*results, strict=True):
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16])
def test_a_large_head_in_half_precision_is_widened_a_piece_at_a_time(kind, stored, monkeypatch):
    monkeypatch.setattr("pema.adapter.loss.WIDENED_BYTES", 0)
    vocabulary = 2 * LEAST_ROWS + 5
    head = make_head(D, vocabulary, **HEADS[kind]).to(stored)
    h, _ = batch(30)
    y = torch.randint(0, vocabulary, (30,), generator=torch.Generator().manual_seed(1))
    pieces, whole = CrossEntropy(head, chunk_bytes=1), CrossEntropy(head.float())
    assert pieces.W_hd.dtype == stored
    assert [tokens for tokens, _ in pieces.pieces()] == [slice(0, 256), slice(256, 512), slice(512, 517)]
    assert [tokens for tokens, _ in whole.pieces()] == [slice(0, vocabulary)]
    losses, gradients = [], []
    for cross_entropy in (pieces, whole):
        mine = h.clone().requires_grad_()
        loss = cross_entropy(mine, y)
        loss.backward()
        losses.append(float(loss.detach()))
        gradients.append(mine.grad)
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)


def test_a_small_head_is_widened_once():
    cross_entropy = CrossEntropy(make_head(D, V).half())
    assert cross_entropy.W_hd.dtype == torch.float32


@given(n=st.integers(1, 400), seed=st.integers(0, 99), spread=st.sampled_from([0.1, 3.0, 300.0]))
@settings(max_examples=30, deadline=None)
def test_cross_entropy_is_finite_and_right_at_any_scale(n, seed, spread):
    head = make_head(D, V)
    h, y = batch(n, seed, spread)
    expected = torch.nn.functional.cross_entropy(h.double() @ head.weight.double().T, y)
    assert float(CrossEntropy(head, chunk_bytes=1)(h, y)) == pytest.approx(float(expected), rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("kind", HEADS)
def test_joint_loss_is_a_slow_loop_over_the_equations(kind):
    head, kappa = make_head(D, V, **HEADS[kind]), 0.3
    adapter = Adapter(AdapterConfig(d=D, vocabulary_size=V, rank=4), seed=5)
    adapter.B_rct = torch.randn(D, 4, generator=torch.Generator().manual_seed(6))
    f, y = batch(9)
    losses = JointLoss(CrossEntropy(head), kappa)(adapter, f, y)
    reconstruction = prediction = 0.0
    for i in range(len(f)):
        h_rct, h_pd = adapter.B_rct @ (adapter.A @ f[i]), adapter.B_pd @ (adapter.A @ f[i])
        reconstruction += sum((a - b) ** 2 for a, b in zip(f[i], h_rct, strict=True)) / D / len(f)
        prediction -= head.logits(h_pd[None])[0].softmax(0)[y[i]].log() / len(f)
    expected = kappa * reconstruction + (1 - kappa) * prediction
    for mine, theirs in zip(losses, (expected, reconstruction, prediction), strict=True):
        assert float(mine.detach()) == pytest.approx(float(theirs.detach()), rel=1e-4)
    mine = torch.autograd.grad(losses.total, [adapter.A, adapter.B_pd])
    theirs = torch.autograd.grad(expected, [adapter.A, adapter.B_pd])
    for one, other in zip(mine, theirs, strict=True):
        assert torch.allclose(one, other, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("kappa", [0.0, 1.0])
def test_a_part_without_weight_is_not_computed(kappa):
    adapter = Adapter(AdapterConfig(d=D, vocabulary_size=V, rank=4))
    adapter.B_rct = torch.ones(D, 4)
    losses = JointLoss(CrossEntropy(make_head(D, V)), kappa)(adapter, *batch(5))
    assert float((losses.prediction if kappa else losses.reconstruction).detach()) == 0
    assert torch.equal(losses.total, losses.reconstruction if kappa else losses.prediction)


def test_the_seen_vocabulary_is_a_smaller_softmax():
    head, tokens = make_head(D, V, bias=True), torch.tensor([2, 3, 11, 20])
    h, _ = batch(6)
    y = tokens[torch.tensor([0, 1, 2, 3, 3, 0])]
    log_p = head.logits(h)[:, tokens].log_softmax(-1)
    expected = -sum(log_p[i, tokens.tolist().index(t)] for i, t in enumerate(y.tolist())) / 6
    assert float(CrossEntropy(head, tokens)(h, y)) == pytest.approx(float(expected), rel=1e-5)
    with pytest.raises(AdapterError, match="a target is not in the seen vocabulary"):
        CrossEntropy(head, tokens)(h, y + 1)


def test_reconstruction_must_come_first():
    adapter = Adapter(AdapterConfig(d=D, vocabulary_size=V, rank=4))
    with pytest.raises(AdapterError, match=r"kappa=0.2 needs B_rct: fit the reconstruction first"):
        JointLoss(CrossEntropy(make_head(D, V)), 0.2)(adapter, *batch(5))


def test_the_whole_batchs_logits_are_never_alive():
    cross_entropy = CrossEntropy(make_head(D, V), chunk_bytes=1)
    cross_entropy(batch(10 * LEAST_ROWS)[0].requires_grad_(), batch(10 * LEAST_ROWS)[1]).backward()
    assert cross_entropy._logits.numel() == LEAST_ROWS * V


def test_bfloat16_is_close():
    head = make_head(D, V, bias=True, scale=0.5, soft_cap=3.0)
    f, y = batch(300)
    adapter = Adapter(AdapterConfig(d=D, vocabulary_size=V, rank=4, residual=True))
    adapter.B_pd.data.normal_(generator=torch.Generator().manual_seed(0))
    gradients = []
    for bfloat16 in (False, True):
        adapter.zero_grad()
        JointLoss(CrossEntropy(head, bfloat16=bfloat16), 0.0)(adapter, f, y).total.backward()
        gradients.append(adapter.B_pd.grad.clone())
    assert torch.allclose(*gradients, atol=0.05 * float(gradients[0].abs().max()))


@pytest.mark.parametrize("p", [0.2, 0.25, 0.5, 0.9])
def test_dropout_drops_its_share_and_keeps_the_mean(p):
    x = torch.ones(1000, 37)
    dropped = Dropout(p, 0, x.device).at(3)(x)
    assert float((dropped == 0).float().mean()) == pytest.approx(p, abs=0.01)
    assert float(dropped.max()) == pytest.approx(1 / (1 - p), rel=1e-4)
    assert float(dropped.mean()) == pytest.approx(1, abs=0.03)


def test_dropout_depends_on_seed_and_step_alone():
    x, cpu = torch.ones(5, 7), torch.device("cpu")
    first, again = Dropout(0.5, 1, cpu), Dropout(0.5, 1, cpu)
    for _ in range(3):
        first.at(1)(x)
    assert torch.equal(first.at(2)(x), again.at(2)(x))
    assert not torch.equal(again.at(2)(x), again.at(3)(x))
    assert not torch.equal(again.at(2)(x), Dropout(0.5, 2, cpu).at(2)(x))
    assert Dropout(0.0, 1, cpu).at(2) is None
