import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pema.generation.mixture import log_weights, mix, mix_logits, mix_logits_of

logits = st.lists(st.floats(-300, 300, width=32), min_size=5, max_size=5)
weight = st.floats(0, 1, width=32)


@given(logits, logits, weight)
def test_mix_is_the_mixture(a, b, share):
    log_p, log_q = torch.tensor([a, b]).double().log_softmax(-1).unbind(0)
    expected = (1 - share) * log_p.exp() + share * log_q.exp()
    found = mix(log_p[None], log_q[None], torch.tensor([share]))
    assert found.dtype == torch.float32
    assert not found.isnan().any()
    torch.testing.assert_close(found.double().exp()[0], expected, atol=1e-5, rtol=1e-4)
    assert found.double().exp().sum().item() == pytest.approx(1, abs=1e-5)


@given(logits, logits)
def test_exact_at_both_ends(a, b):
    log_p, log_q = torch.tensor([a, b]).log_softmax(-1).unbind(0)
    assert torch.equal(mix(log_p, log_q, torch.tensor(0.0)), log_p)
    assert torch.equal(mix(log_p, log_q, torch.tensor(1.0)), log_q)


def test_impossible_tokens():
    nothing = -torch.inf
    log_p = torch.tensor([nothing, 0.0, nothing, 0.5]).log_softmax(-1)
    log_q = torch.tensor([nothing, nothing, 0.0, 0.5]).log_softmax(-1)
    for share in (0.0, 0.3, 1.0):
        found = mix(log_p, log_q, torch.tensor(share))
        assert not found.isnan().any()
        torch.testing.assert_close(found.exp(), (1 - share) * log_p.exp() + share * log_q.exp())


def test_in_log_space_tiny_probabilities_stay():
    log_p, log_q = torch.tensor([0.0, -200.0]), torch.tensor([0.0, -300.0])
    found = mix(log_p, log_q, torch.tensor(0.5))
    assert found[1].item() == pytest.approx(-200 - 0.6931, abs=1e-3)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 3))
def test_stacked_logits_give_the_same(seed, k):
    torch.manual_seed(seed)
    raw = 10 * torch.randn(2, 2 * k, 7)
    shares = torch.rand(2, k).round(decimals=1)
    logs = log_weights(shares)[..., None].unbind(2)
    expected = mix(raw[:, :k].log_softmax(-1), raw[:, k:].log_softmax(-1), shares)
    zero_point = raw[:, :k].logsumexp(-1, keepdim=True)
    torch.testing.assert_close(mix_logits(raw, *logs), expected + zero_point, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(mix_logits(raw.bfloat16(), *logs), mix_logits(raw.bfloat16().float(), *logs))


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 3))
def test_a_smaller_vocabulary_gives_the_same(seed, k):
    torch.manual_seed(seed)
    tokens = torch.tensor([1, 2, 5])
    plm, pema = 10 * torch.randn(2, k, 7), 10 * torch.randn(2, k, 3)
    shares = torch.rand(2, k).round(decimals=1)
    logs = log_weights(shares)[..., None].unbind(2)
    whole = torch.full((2, k, 7), -torch.inf)
    whole[..., tokens] = pema.log_softmax(-1)
    expected = mix(plm.log_softmax(-1), whole, shares)
    zero_point = plm.logsumexp(-1, keepdim=True)
    torch.testing.assert_close(mix_logits_of(tokens, plm, pema, *logs), expected + zero_point, atol=1e-4, rtol=1e-5)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6))
def test_the_zero_point_is_the_plms_with_every_weight(seed):
    torch.manual_seed(seed)
    tokens, raw = torch.tensor([1, 2, 5]), 10 * torch.randn(1, 2, 7)
    raw[:, 0, 3] = -torch.inf

    def mixed(share):
        logs = log_weights(torch.tensor([[share]]))[..., None].unbind(2)
        return mix_logits(raw, *logs), mix_logits_of(tokens, raw[:, :1], raw[:, 1:, tokens], *logs)

    for at_0, near_0, near_1, at_1 in zip(*map(mixed, (0.0, 1e-12, 1 - 2**-24, 1.0)), strict=True):
        assert torch.equal(at_0, raw[:, :1])
        torch.testing.assert_close(near_0.softmax(-1), at_0.softmax(-1), atol=1e-5, rtol=1e-4)
        likely = at_0 > at_0.amax() - 5
        torch.testing.assert_close(near_0[likely], at_0[likely], atol=1e-4, rtol=1e-5)
        torch.testing.assert_close(near_1.softmax(-1), at_1.softmax(-1), atol=1e-5, rtol=1e-4)
        for logits in (at_0, near_0, near_1, at_1):
            torch.testing.assert_close(logits.logsumexp(-1), raw[:, 0].logsumexp(-1)[:, None], atol=1e-4, rtol=1e-5)
