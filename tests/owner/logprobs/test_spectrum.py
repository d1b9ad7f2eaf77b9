"""The spectrum of centred log-probabilities: where its gap is, and what a soft cap leaves over."""

import pytest
import torch

from pema.owner.logprobs.spectrum import LEAST, SURE, Spectrum, bend, widest

V, D = 600, 24


def logits(n, seed=0):
    draw = torch.Generator().manual_seed(seed)
    W = torch.randn(V, D, generator=draw, dtype=torch.float64)
    z = torch.randn(n, D, generator=draw, dtype=torch.float64) * torch.linspace(2.0, 0.2, D)
    return z @ W.T


def spectrum(values):
    values = values.log_softmax(dim=1)
    values = values - values.mean(dim=1, keepdim=True)

    def columns(start, stop):
        return values[:, start:stop]

    return columns, Spectrum.of(columns, len(values), V)


def test_its_values_are_those_of_a_singular_value_decomposition():
    values = logits(40).log_softmax(dim=1)
    centred = values - values.mean(dim=1, keepdim=True)
    _, result = spectrum(logits(40))
    expected = torch.linalg.svdvals(centred)
    torch.testing.assert_close(result.values[:D], expected[:D])
    torch.testing.assert_close(result.vectors.T @ result.vectors, torch.eye(40, dtype=torch.float64))


@pytest.mark.parametrize(
    ("rounded", "least"),
    [
        (lambda x: x, 1e4),
        (lambda x: x.float().double(), 1e4),
        (lambda x: (x * 1e4).round() / 1e4, 1e3),
        (lambda x: (x * 1e2).round() / 1e2, SURE),
        (lambda x: x.bfloat16().double(), LEAST),
    ],
    ids=["exact", "float32", "4 decimals", "2 decimals", "bfloat16"],
)
def test_the_gap_is_at_d(rounded, least):
    values = rounded(logits(60).log_softmax(dim=1))
    values = values - values.mean(dim=1, keepdim=True)
    d, gap = Spectrum.of(lambda start, stop: values[:, start:stop], 60, V).gap()
    assert d == D
    assert gap > least


@pytest.mark.parametrize("n", [4, 9, 16, 24, 30])
def test_too_few_contexts_show_no_gap(n):
    """8 singular values after the gap are needed, so that it is not the end of the spectrum."""
    assert widest(n) < D
    _, result = spectrum(logits(n))
    assert result.gap()[1] < LEAST


@pytest.mark.parametrize("cap", [10.0, 30.0, 50.0])
def test_a_soft_cap_leaves_a_curve_over(cap):
    values = logits(60)
    columns, result = spectrum(cap * torch.tanh(values / cap))
    assert bend(columns, result, D, V) > 0.4


@pytest.mark.parametrize("rounded", [lambda x: (x * 1e2).round() / 1e2, lambda x: x.bfloat16().double()])
def test_rounding_leaves_none_over(rounded):
    values = rounded(logits(60).log_softmax(dim=1))
    values = values - values.mean(dim=1, keepdim=True)

    def columns(start, stop):
        return values[:, start:stop]

    assert bend(columns, Spectrum.of(columns, 60, V), D, V) < 0.01
