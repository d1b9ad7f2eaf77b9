from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pema.adapter.fitted import fit_schedule
from pema.adapter.likelihood import em_step, log_ratio, maximise
from pema.errors import ConfigError

ZERO = torch.zeros(1, dtype=torch.int64)


class Pairs:
    """A view of a memory: held-out pairs, in batches."""

    def __init__(self, f, targets, steps, lengths):
        self.memory = None
        self.columns = {"representations": f, "targets": targets, "steps": steps, "source_lengths": lengths}
        self.columns["rows"] = torch.arange(len(targets))

    def share(self, processes):
        return self

    def batches(self, batch_size, device):
        assert device == Model.weight.device
        for start in range(0, len(self.columns["targets"]), batch_size):
            yield SimpleNamespace(**{k: v[start : start + batch_size] for k, v in self.columns.items()})


class Model(torch.nn.Module):
    """Head and adapter at once: f is [log P_LM, log P_PEMA] of a vocabulary of 4."""

    weight = torch.zeros(4, 8)
    tokens = None

    def logits(self, h, tokens=None):
        return h[:, :4]

    def forward(self, f):
        assert not self.training
        return f.roll(-4, -1)

    def context(self, memory, rows):
        return None

    def copy(self, f, context, W_hd):
        return None


def log_likelihood(weights, log_ratios, bin_of_pair):
    """Sum over pairs of log(lambda P_PEMA(y) / P_LM(y) + 1 - lambda): what EM climbs, up to a constant."""
    weight = weights[bin_of_pair]
    return torch.logaddexp(weight.log() + log_ratios, torch.log1p(-weight)).sum()


def fit(ratios, **settings):
    return maximise(ratios, torch.zeros(len(ratios), dtype=torch.int64), 1, **settings).item()


def test_known_answers():
    # Half of the tokens are twice as likely under P_PEMA, half are half as likely: f'(lambda) = 0 at 1/2.
    assert fit(torch.tensor([2.0, 0.5]).double().log()) == pytest.approx(0.5, abs=1e-6)
    # 3 tokens only P_PEMA can make, 1 only the PLM: lambda = 3/4.
    assert fit(torch.tensor([float("inf")] * 3 + [-float("inf")])) == pytest.approx(0.75, abs=1e-9)
    # d/dl [2 log(1 + l) + log(1 - l / 2)] = 0 -> 2 / (1 + l) = 1 / (2 - l) -> l = 1: P_PEMA alone is best.
    assert fit(torch.tensor([2.0, 2.0, 0.5]).double().log(), tolerance=1e-7, most_steps=5000) > 0.99
    # Every token is likelier under the PLM.
    assert fit(torch.tensor([0.5, 0.1]).double().log()) == pytest.approx(0, abs=1e-5)


@settings(max_examples=40)
@given(st.lists(st.floats(-20, 20), min_size=2, max_size=30))
def test_likelihood_never_decreases(ratios):
    ratios = torch.tensor(ratios, dtype=torch.float64)
    place = torch.arange(len(ratios)) % 2
    weights, before = torch.full((2,), 0.5, dtype=torch.float64), -torch.inf
    for _ in range(20):
        now = log_likelihood(weights, ratios, place).item()
        assert now >= before - 1e-9
        weights, before = em_step(weights, ratios, place), now


@settings(max_examples=25, deadline=None)
@given(st.lists(st.floats(-6, 6), min_size=1, max_size=40))
def test_equals_a_grid_search(ratios):
    ratios = torch.tensor(ratios, dtype=torch.float64)
    grid = torch.linspace(0, 1, 2001, dtype=torch.float64)
    place = torch.zeros(len(ratios), dtype=torch.int64)
    best = max(log_likelihood(weight[None], ratios, place).item() for weight in grid)
    found = torch.tensor([fit(ratios, tolerance=1e-9, most_steps=20000)], dtype=torch.float64)
    assert log_likelihood(found, ratios, place).item() >= best - 1e-3


def test_a_bin_of_few_pairs_leans_on_all():
    ratios = torch.tensor([1.0] * 500 + [-1.0] * 500 + [8.0]).double()
    place = torch.tensor([0] * 1000 + [1])
    together = torch.tensor([0.4], dtype=torch.float64)
    values = maximise(ratios, place, 3, prior=together, prior_pairs=50).tolist()
    assert values[0] == pytest.approx(0.5, abs=0.02)
    assert 0.4 < values[1] < 0.42
    assert values[2] == pytest.approx(0.4)
    assert maximise(ratios, place, 2)[1] > 0.99


def test_gold_tokens_from_logits():
    torch.manual_seed(0)
    f, gold = torch.randn(6, 8), torch.tensor([0, 1, 2, 3, 0, 1])
    expected = [f[i, 4:].log_softmax(-1)[y] - f[i, :4].log_softmax(-1)[y] for i, y in enumerate(gold)]
    found = log_ratio(Model().eval(), Model(), f, gold)
    torch.testing.assert_close(found, torch.stack(expected).double())


def test_fits_each_relative_position():
    # At the start of a sequence P_PEMA made the tokens, behind t / SL = 1 the PLM did.
    torch.manual_seed(0)
    n = 4000
    steps, lengths = torch.randint(0, 20, (n,)), torch.full((n,), 10)
    f = 2 * torch.randn(n, 8)
    plm, pema = f[:, :4].softmax(-1), f[:, 4:].softmax(-1)
    share = torch.where(steps < 10, 0.8, 0.1)[:, None]
    targets = torch.multinomial(share * pema + (1 - share) * plm, 1).squeeze(1)
    model = Model()
    schedule = fit_schedule(model, model, Pairs(f, targets, steps, lengths), bins=2, batch_size=333)
    assert model.training
    assert schedule.span == 2.0
    assert schedule.values == pytest.approx((0.8, 0.1), abs=0.06)
    smaller = fit_schedule(model, model, Pairs(f, targets, steps, lengths), bins=2, batch_size=4000)
    assert schedule.values == pytest.approx(smaller.values, abs=1e-6)


def test_what_cannot_be_fitted_is_refused():
    model, nothing = Model(), Pairs(torch.zeros(0, 8), ZERO[:0], ZERO[:0], ZERO[:0])
    with pytest.raises(ConfigError, match="needs held-out pairs"):
        fit_schedule(model, model, nothing)
    with pytest.raises(ConfigError, match="bins=0 is too small"):
        fit_schedule(model, model, nothing, bins=0)
    with pytest.raises(ConfigError, match=r"prior_pairs=-1\.0 is too small"):
        fit_schedule(model, model, nothing, prior_pairs=-1)
