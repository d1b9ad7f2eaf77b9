import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from made_memories import make_memory, rows

from pema.adapter.reconstruction import closed_form, fit_reconstruction_sgd, reconstruction_error
from pema.errors import AdapterError, ConfigError


@pytest.fixture(scope="module")
def memory(tmp_path_factory):
    return make_memory(tmp_path_factory.mktemp("reconstruction") / "memory", examples=60)


@pytest.mark.parametrize("rank", [1, 5, 12])
def test_closed_form_is_the_truncated_svd(memory, rank):
    f, _ = rows(memory.view())
    A, B_rct, error = closed_form(memory.view(), rank, 12)
    _, S, Vh = torch.linalg.svd(f.double(), full_matrices=False)
    best = Vh[:rank].T @ Vh[:rank]
    assert (A.shape, B_rct.shape) == ((rank, 12), (12, rank))
    assert torch.allclose((B_rct @ A).double(), best, atol=1e-5)
    assert torch.allclose(A @ A.T, torch.eye(rank), atol=1e-5)
    assert error == pytest.approx(float(S[rank:].square().sum()) / f.numel(), rel=1e-5, abs=1e-6)
    assert error == pytest.approx(float((f - f @ A.T @ B_rct.T).square().mean()), rel=1e-5, abs=1e-6)
    assert error == pytest.approx(reconstruction_error(memory.view(), A, B_rct), rel=1e-5, abs=1e-6)


def test_representations_of_low_rank_are_reconstructed_exactly(tmp_path):
    memory = make_memory(tmp_path / "memory", directions=3)
    *_, error = closed_form(memory.view(), 3, 12)
    assert error < 1e-6 * float(rows(memory.view())[0].square().mean())


def test_more_directions_than_pairs_is_no_trouble(tmp_path):
    memory = make_memory(tmp_path / "memory", examples=1, d=30)
    assert memory.pairs < 30
    A, B_rct, error = closed_form(memory.view(), 30, 30)
    assert error < 1e-8
    assert bool(A.isfinite().all())
    assert bool(B_rct.isfinite().all())


@given(rank=st.integers(1, 12), seed=st.integers(0, 50), rate=st.sampled_from([1e-3, 1e-2]))
@settings(max_examples=8, deadline=None)
def test_the_papers_procedure_never_beats_the_closed_form(memory, rank, seed, rate):
    *_, best = closed_form(memory.view(), rank, 12)
    *_, other = fit_reconstruction_sgd(
        memory.view(), rank, 12, learning_rate=rate, epochs=8, batch_size=128, seed=seed, patience=2
    )
    assert best <= other * (1 + 1e-6)


def test_the_papers_procedure_approaches_the_closed_form(memory):
    *_, best = closed_form(memory.view(), 6, 12)
    A, B_rct, other = fit_reconstruction_sgd(memory.view(), 6, 12, learning_rate=1e-2, epochs=150, batch_size=64)
    assert other < 1.1 * best
    assert other == pytest.approx(reconstruction_error(memory.view(), A, B_rct))


def test_early_stopping_keeps_the_best(memory):
    train, held_out = memory.split(0.3, 0)
    A, B_rct, _ = fit_reconstruction_sgd(train, 4, 12, held_out=held_out, learning_rate=0.3, epochs=30, patience=2)
    longer = fit_reconstruction_sgd(train, 4, 12, held_out=held_out, learning_rate=0.3, epochs=1)
    assert reconstruction_error(held_out, A, B_rct) <= reconstruction_error(held_out, *longer[:2])


def test_too_large_a_rank_is_refused(memory):
    with pytest.raises(ConfigError, match="rank=13 is larger than d = 12"):
        closed_form(memory.view(), 13, 12)
    with pytest.raises(ConfigError, match="rank=13 is larger than d = 12"):
        fit_reconstruction_sgd(memory.view(), 13, 12)


@pytest.mark.parametrize("fit", [closed_form, fit_reconstruction_sgd])
def test_a_representation_that_is_not_finite_is_named(tmp_path, fit):
    memory = make_memory(tmp_path / "memory", nan_at=4)
    words = rf"the representation of pair 4 \(of {memory.pairs}; step \d+ of its example\) is not finite"
    with pytest.raises(AdapterError, match=words):
        fit(memory.view(), 3, 12)


def test_divergence_is_named(memory):
    with pytest.raises(AdapterError, match="reconstruction diverged in epoch 1: lower its learning rate"):
        fit_reconstruction_sgd(memory.view(), 3, 12, learning_rate=1e30)


def test_an_empty_view_is_refused(memory):
    class Empty:
        pairs = 0

    with pytest.raises(AdapterError, match="the memory contains no pairs to train on"):
        closed_form(Empty(), 3, 12)
