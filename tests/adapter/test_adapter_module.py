import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from made_memories import describe, make_head

from pema.adapter.config import AdapterConfig
from pema.adapter.module import Adapter
from pema.errors import AdapterError, MismatchError

D, V = 6, 11


def filled(*, tokens=None, **options):
    """An adapter whose matrices are all non-zero."""
    adapter = Adapter(AdapterConfig(d=D, vocabulary_size=V, **{"rank": 4} | options), tokens).requires_grad_(False)
    random = torch.Generator().manual_seed(1)
    adapter.B_pd.normal_(generator=random)
    adapter.B_rct = torch.randn(D, adapter.config.rank, generator=random)
    return adapter


def vectors(n=5, d=D, seed=2):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def times(M, x):
    return [sum(M[i][j] * x[j] for j in range(len(x))) for i in range(len(M))]


@pytest.mark.parametrize("residual", [False, True])
def test_forward_is_the_equation(residual):
    adapter, f = filled(residual=residual), vectors()
    A, B_pd, B_rct = adapter.A.tolist(), adapter.B_pd.tolist(), adapter.B_rct.tolist()
    for i, x in enumerate(f.tolist()):
        h_pd = times(B_pd, times(A, x))
        h_pd = [a + b for a, b in zip(h_pd, x, strict=True)] if residual else h_pd
        assert adapter(f)[i].tolist() == pytest.approx(h_pd, abs=1e-5)
        assert adapter.reconstruct(f)[i].tolist() == pytest.approx(times(B_rct, times(A, x)), abs=1e-5)


def test_forward_with_gelu_is_the_equation():
    adapter, f = filled(residual=True, activation="gelu", rank=20), vectors()
    for i, x in enumerate(f.tolist()):
        rms = math.sqrt(sum(v * v for v in x) / D)
        z = times(adapter.A.tolist(), [v / rms for v in x])
        z = [v * 0.5 * (1 + math.erf(v / math.sqrt(2))) for v in z]
        h_pd = [a + b for a, b in zip(x, times(adapter.B_pd.tolist(), z), strict=True)]
        assert adapter(f)[i].tolist() == pytest.approx(h_pd, abs=1e-5)


@pytest.mark.parametrize("activation", ["none", "gelu"])
def test_a_new_residual_adapter_is_the_plm(activation):
    head, f = make_head(D, V, bias=True, scale=0.5, soft_cap=2.0), vectors()
    adapter = Adapter(AdapterConfig(d=D, vocabulary_size=V, rank=4, residual=True, activation=activation))
    assert torch.equal(adapter(f), f)
    assert torch.equal(adapter.log_probs(f, head), head.logits(f).log_softmax(-1))


@given(st.sets(st.integers(0, V - 1), min_size=1), st.integers(0, 100))
@settings(max_examples=40, deadline=None)
def test_seen_vocabulary_sums_to_one_and_agrees_with_the_full_one(tokens, seed):
    tokens = torch.tensor(sorted(tokens))
    head, f = make_head(D, V, bias=True), vectors(seed=seed)
    log_p = filled(vocabulary="seen", tokens=tokens).log_probs(f, head)
    assert log_p.shape == (len(f), V)
    assert torch.allclose(log_p.exp().sum(-1), torch.ones(len(f)), atol=1e-5)
    unseen = torch.ones(V, dtype=torch.bool).index_fill_(0, tokens, False)
    assert bool((log_p[:, unseen] == -torch.inf).all())
    full = filled().log_probs(f, head)[:, tokens]
    assert torch.allclose(log_p[:, tokens], full - full.logsumexp(-1, keepdim=True), atol=1e-5)


def test_half_precision_representations_are_read():
    adapter, f = filled(), vectors().to(torch.bfloat16)
    assert torch.equal(adapter(f), adapter(f.float()))
    assert adapter.log_probs(f, make_head(D, V)).dtype == torch.float32


def test_the_same_seed_makes_the_same_start():
    config = AdapterConfig(d=D, vocabulary_size=V, rank=4)
    one, two, other = Adapter(config, seed=3), Adapter(config, seed=3), Adapter(config, seed=4)
    assert torch.equal(one.A, two.A)
    assert torch.equal(one.B_pd, two.B_pd)
    assert not torch.equal(one.A, other.A)
    assert one.A.abs().max() <= D**-0.5


def test_tokens_are_checked():
    config = AdapterConfig(d=D, vocabulary_size=V, rank=4, vocabulary="seen")
    with pytest.raises(AdapterError, match="vocabulary='seen' needs tokens"):
        Adapter(config)
    with pytest.raises(AdapterError, match="vocabulary='full' takes no tokens"):
        Adapter(AdapterConfig(d=D, vocabulary_size=V, rank=4), torch.tensor([1]))
    for wrong in ([], [3, 1], [1, 1], [V], [-1, 2]):
        with pytest.raises(AdapterError, match=f"sorted, unique and within 0..{V - 1}"):
            Adapter(config, torch.tensor(wrong, dtype=torch.int64))


def test_no_reconstruction_without_b_rct():
    adapter = Adapter(AdapterConfig(d=D, vocabulary_size=V, rank=4))
    with pytest.raises(AdapterError, match="has no B_rct: it was trained with kappa=0"):
        adapter.reconstruct(vectors())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"fingerprint": "x" * 64}, "this adapter belongs to another PLM"),
        ({"tokenizer_fingerprint": "x" * 64}, "this adapter belongs to another tokenizer"),
        ({"head_fingerprint": "x" * 64}, "this adapter belongs to another LM head"),
        ({"tap": "norm_input"}, "this adapter belongs to another tap"),
    ],
)
def test_another_plm_is_refused_by_name(change, words):
    plm = describe(make_head(D, V))
    adapter = Adapter(AdapterConfig(d=D, vocabulary_size=V, rank=4, plm=plm))
    adapter.require(plm)
    with pytest.raises(MismatchError, match=words):
        adapter.require(describe(make_head(D, V), **change))


def test_another_size_is_refused_even_where_no_plm_is_recorded():
    with pytest.raises(MismatchError, match=r"\(d, V\) = \(6, 11\), made has \(6, 12\)"):
        Adapter(AdapterConfig(d=D, vocabulary_size=V, rank=4)).require(describe(make_head(D, V + 1)))
