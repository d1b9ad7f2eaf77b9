"""DP-SGD: clipped gradients, noise, accounting, refusals, and the published files."""

import json
import math
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from killed_training import PRIVATE_SETTINGS, start
from made_memories import make_head, make_memory, rows
from opacus.grad_sample import GradSampleModule
from torch import nn
from torch.nn.functional import cross_entropy, gelu, rms_norm

from pema.adapter import private, training
from pema.adapter.accounting import accountant_name, epsilon_spent, noise_multiplier
from pema.adapter.checkpoint import Checkpoint
from pema.adapter.clipping import clipped_sum
from pema.adapter.config import AdapterConfig, TrainConfig
from pema.adapter.loss import CrossEntropy
from pema.adapter.module import Adapter
from pema.adapter.presets import preset
from pema.adapter.private import PrivateRun
from pema.adapter.secret import Secret
from pema.adapter.training import train
from pema.errors import AdapterError, ConfigError, MismatchError
from pema.files import read_json
from pema.memory.reader import View

SMALL = {"rank": 8, "batch_size": 10, "epochs": 2, "dp_epsilon": 3.0, "dp_delta": 1e-3}
SHAPES = {
    "linear": {},
    "residual": {"residual": True},
    "gelu": {"residual": True, "activation": "gelu"},
}


@pytest.fixture(scope="module")
def memory(tmp_path_factory):
    return make_memory(tmp_path_factory.mktemp("private") / "memory", examples=40)


@pytest.fixture(scope="module")
def trained(memory, tmp_path_factory):
    """A private adapter's folder, and what training returned."""
    folder = tmp_path_factory.mktemp("trained") / "adapter"
    return folder, train(memory, preset("private", **SMALL), folder)


def made(shape, d=12, V=40, rank=5):
    """An adapter that has left its start."""
    adapter = Adapter(AdapterConfig(d=d, vocabulary_size=V, rank=rank, **SHAPES[shape]))
    with torch.no_grad():
        adapter.B_pd.copy_(0.3 * torch.randn(d, rank, generator=torch.Generator().manual_seed(1)))
    return adapter


def some_pairs(d=12, V=40, lengths=(3, 1, 7, 2)):
    random = torch.Generator().manual_seed(2)
    n = sum(lengths)
    f = torch.randn(n, d, generator=random)
    return f, torch.randint(0, V, (n,), generator=random), torch.tensor(lengths)


def slowly(adapter, head, f, targets, lengths, clip):
    """Autograd, one example after the other."""
    total = [torch.zeros_like(adapter.A), torch.zeros_like(adapter.B_pd)]
    norms = []
    for f_e, y_e in zip(f.split(lengths.tolist()), targets.split(lengths.tolist()), strict=True):
        loss = cross_entropy(head.logits(adapter(f_e)), y_e)
        gradients = torch.autograd.grad(loss, [adapter.A, adapter.B_pd])
        norms.append(math.sqrt(sum(float(g.square().sum()) for g in gradients)))
        total = [t + g * min(1.0, clip / norms[-1]) for t, g in zip(total, gradients, strict=True)]
    return total, norms


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("clip", [1e-3, 0.8, 1e3])
def test_the_clipped_sum_is_that_of_a_slow_loop(shape, clip):
    head, adapter = make_head(), made(shape)
    f, y, lengths = some_pairs()
    expected, _ = slowly(adapter, head, f, y, lengths, clip)
    found = clipped_sum(adapter, CrossEntropy(head), f, y, lengths, clip)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6 * clip)


def test_some_are_clipped_and_some_are_not():
    _, norms = slowly(made("gelu"), make_head(), *some_pairs(), 1.0)
    assert min(norms) < 0.8 < max(norms)


def test_bias_scale_and_cap_of_the_head_are_in_the_gradient():
    head, adapter = make_head(bias=True, scale=0.5, soft_cap=3.0), made("gelu")
    f, y, lengths = some_pairs()
    expected, _ = slowly(adapter, head, f, y, lengths, 0.1)
    found = clipped_sum(adapter, CrossEntropy(head), f, y, lengths, 0.1)
    torch.testing.assert_close(found.B_pd, expected[1], rtol=1e-4, atol=1e-7)


def test_the_bound_also_holds_in_bfloat16():
    f, y, lengths = some_pairs(lengths=(7,))
    loss = CrossEntropy(make_head(), bfloat16=True)
    found = clipped_sum(made("gelu"), loss, f, y, lengths, 1e-2, bfloat16=True)
    assert math.sqrt(sum(float(g.square().sum()) for g in found)) == pytest.approx(1e-2, rel=1e-5)


def test_it_is_what_opacus_makes_of_the_same_network():
    """Opacus' per-sample gradients of the adapter written as two nn.Linear, examples padded to one length."""
    head, adapter = make_head(), made("gelu")
    f, y, lengths = some_pairs(lengths=(4, 4, 4))

    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.A, self.B_pd = nn.Linear(12, 5, bias=False), nn.Linear(5, 12, bias=False)

        def forward(self, f):
            return f + self.B_pd(gelu(self.A(rms_norm(f, (12,)))))

    network = Network()
    network.A.weight.data.copy_(adapter.A)
    network.B_pd.weight.data.copy_(adapter.B_pd)
    module = GradSampleModule(network, loss_reduction="sum")
    logits = head.logits(module(f.view(3, 4, 12)))
    (cross_entropy(logits.flatten(0, 1), y, reduction="sum") / 4).backward()
    samples = [network.A.weight.grad_sample, network.B_pd.weight.grad_sample]
    norms = sum(g.square().sum((1, 2)) for g in samples).sqrt()
    found = clipped_sum(adapter, CrossEntropy(head), f, y, lengths, 0.5)
    for one, sample in zip(found, samples, strict=True):
        expected = torch.einsum("e,e...->...", (0.5 / norms).clamp(max=1), sample)
        torch.testing.assert_close(one, expected, rtol=1e-4, atol=1e-6)


def run_of(memory, tmp_path, **changes):
    config = preset("private", **SMALL | changes)
    return PrivateRun(memory, config, tmp_path, Checkpoint(tmp_path, config, "digest"))


def test_a_blank_example_changes_the_sum_by_at_most_the_clip_norm(memory, tmp_path):
    run = run_of(memory, tmp_path, clip=0.05)
    with torch.no_grad():
        run.adapter.B_pd.copy_(0.3 * torch.randn(12, 8, generator=torch.Generator().manual_seed(1)))
    drawn = np.arange(0, 40, 2)
    whole = run.clipped_sum(drawn)
    changes = []
    for left_out in range(len(drawn)):
        rest = run.clipped_sum(np.delete(drawn, left_out))
        changes.append(math.sqrt(sum(float((whole[name] - rest[name]).square().sum()) for name in whole)))
    assert max(changes) <= 0.05 * (1 + 1e-4)
    assert max(changes) == pytest.approx(0.05, rel=1e-3)


def test_large_batches_are_taken_in_parts(memory, tmp_path, monkeypatch):
    run = run_of(memory, tmp_path)
    whole = run.clipped_sum(np.arange(40))
    monkeypatch.setattr(private, "EXAMPLES_AT_ONCE", 7)
    for name, gradient in run.clipped_sum(np.arange(40)).items():
        torch.testing.assert_close(gradient, whole[name], rtol=1e-4, atol=1e-6)


def test_an_empty_batch_is_noise_alone(memory, tmp_path, monkeypatch):
    run = run_of(memory, tmp_path)
    monkeypatch.setattr(Secret, "poisson_sample", lambda *_: np.array([], np.int64))
    run.step()
    sigma = run.state.figures["noise_multiplier"]
    expected = sigma * run.secret.normal(0, "B_pd", (12, 8)) / 10
    torch.testing.assert_close(run.adapter.B_pd.grad, expected.float())
    assert run.state.step == 1


def test_a_step_is_the_noisy_clipped_mean(memory, tmp_path):
    run = run_of(memory, tmp_path, clip=0.5)
    total = run.clipped_sum(run.secret.poisson_sample(0, 40, 0.25))
    run.step()
    for name, parameter in run.parameters.items():
        noise = 0.5 * run.state.figures["noise_multiplier"] * run.secret.normal(0, name, parameter.shape)
        torch.testing.assert_close(parameter.grad, ((total[name] + noise) / 10).float())


def test_the_noise_is_standard_normal():
    noise = Secret(b"k" * 32).normal(3, "A", (1000, 301))
    assert noise.shape == (1000, 301)
    assert float(noise.mean()) == pytest.approx(0, abs=5 / math.sqrt(noise.numel()))
    assert float(noise.var()) == pytest.approx(1, abs=5 * math.sqrt(2 / noise.numel()))
    assert float(noise.pow(4).mean()) == pytest.approx(3, abs=5 * math.sqrt(96 / noise.numel()))
    for z, share in ((1.0, 0.841345), (3.0, 0.998650)):
        assert float((noise < z).double().mean()) == pytest.approx(share, abs=5 * math.sqrt(share / noise.numel()))
    flat = noise.flatten()
    half = len(flat) // 2
    assert float((flat[:half] * flat[half : 2 * half]).mean()) == pytest.approx(0, abs=5 / math.sqrt(half))


def test_every_example_is_drawn_at_the_rate_and_alone():
    secret = Secret(b"k" * 32)
    drawn = np.zeros((4000, 20))
    for step in range(4000):
        drawn[step, secret.poisson_sample(step, 20, 0.3)] = 1
    assert np.abs(drawn.mean(0) - 0.3).max() < 5 * math.sqrt(0.21 / 4000)
    assert np.abs(np.corrcoef(drawn.T) - np.eye(20)).max() < 5 / math.sqrt(4000)
    assert drawn.sum(1).var() == pytest.approx(20 * 0.21, rel=0.15)


def test_draws_follow_from_key_step_and_purpose_alone():
    one, same, other = Secret(b"1" * 32), Secret(b"1" * 32), Secret(b"2" * 32)
    assert torch.equal(one.normal(5, "A", (3, 3)), same.normal(5, "A", (3, 3)))
    for differing in (other.normal(5, "A", (3, 3)), one.normal(6, "A", (3, 3)), one.normal(5, "B_pd", (3, 3))):
        assert not torch.equal(one.normal(5, "A", (3, 3)), differing)
    assert len({Secret.draw().key for _ in range(20)}) == 20
    assert len(Secret.draw().key) == 32


@pytest.mark.parametrize(("epsilon", "rate", "steps"), [(8.0, 0.25, 8)])
def test_the_epsilon_spent_is_at_most_what_was_asked(epsilon, rate, steps):
    sigma = noise_multiplier(epsilon, 1e-3, rate, steps)
    assert 0.9 * epsilon < epsilon_spent(sigma, 1e-3, rate, steps) <= epsilon
    assert epsilon_spent(0.9 * sigma, 1e-3, rate, steps) > epsilon


def test_one_step_on_everything_is_the_gaussian_mechanism():
    """delta = Phi(1/(2s) - e s) - exp(e) Phi(-1/(2s) - e s) (Balle and Wang 2018), sensitivity 1."""

    def delta(epsilon, s):
        normal = lambda x: math.erfc(-x / math.sqrt(2)) / 2  # noqa: E731
        return normal(1 / (2 * s) - epsilon * s) - math.exp(epsilon) * normal(-1 / (2 * s) - epsilon * s)

    spent = epsilon_spent(2.0, 1e-3, 1.0, 1)
    assert delta(spent, 2.0) <= 1e-3
    assert delta(spent - 0.03, 2.0) > 1e-3


def test_too_small_a_budget(monkeypatch):
    monkeypatch.setattr("opacus.accountants.utils.MAX_SIGMA", 1)
    with pytest.raises(ConfigError, match=r"dp_epsilon=0.01, dp_delta=0.001 cannot be reached in 9 steps: .* Raise"):
        noise_multiplier(0.01, 1e-3, 0.5, 9)


def test_without_opacus(memory, tmp_path, monkeypatch):
    noise_multiplier.cache_clear()
    for name in [name for name in sys.modules if name.split(".")[0] == "opacus"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "opacus", None)
    with pytest.raises(ConfigError, match=r"opacus, which is not installed: pip install 'opacus>="):
        train(memory, preset("private", **SMALL), tmp_path / "adapter")
    for call in (lambda: epsilon_spent(1.0, 1e-3, 0.1, 1), accountant_name):
        with pytest.raises(ConfigError, match="opacus, which is not installed"):
            call()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"kappa": 0.2, "activation": "none"}, r"kappa=0.2 with dp_epsilon=3.0: reconstruction reads .* Use kappa=0.0"),
        ({"init": "pca"}, r"init='pca' with dp_epsilon=3.0: .* Use init='random'"),
        ({"vocabulary": "seen"}, r"vocabulary='seen' with dp_epsilon=3.0: .* Use vocabulary='full'"),
        ({"dev_fraction": 0.1}, r"dev_fraction=0.1 with dp_epsilon=3.0: early stopping .* Use dev_fraction=0.0"),
        ({"dropout": 0.1}, r"dropout=0.1 with dp_epsilon=3.0: .* Use dropout=0.0"),
        ({"clip": 0.0}, r"clip=0 with dp_epsilon=3.0: noise hides only what is clipped. Use clip=1"),
        ({"dp_delta": None}, r"dp_epsilon=3.0 with dp_delta=None: .* needs both"),
        ({"dp_epsilon": None}, r"preset 'private' trains with DP-SGD: give dp_epsilon and dp_delta"),
        ({"dp_epsilon": 0.0}, r"dp_epsilon=0.0 cannot be reached by finite noise"),
        ({"dp_delta": 0.0}, r"dp_delta=0.0 cannot be reached by finite noise"),
        ({"dp_epsilon": -1.0}, r"dp_epsilon=-1.0 is too small"),
        ({"dp_epsilon": "8"}, r"dp_epsilon='8' must be a number"),
    ],
)
def test_what_reads_the_data_without_noise_is_refused(changes, words):
    with pytest.raises(ConfigError, match=words):
        preset("private", **SMALL | changes)


def test_differential_privacy_needs_both_numbers():
    with pytest.raises(ConfigError, match=r"dp_epsilon=None with dp_delta=0.001: .* needs both"):
        TrainConfig(dp_delta=0.001)


def test_what_does_not_fit_the_number_of_examples(memory, tmp_path):
    with pytest.raises(ConfigError, match=r"dp_delta=0.025 for 40 examples: .* Use less than 0.025"):
        train(memory, preset("private", **SMALL | {"dp_delta": 0.025}), tmp_path / "adapter")
    with pytest.raises(ConfigError, match=r"batch_size=41 with dp_epsilon counts examples, and the memory has 40"):
        train(memory, preset("private", **SMALL | {"batch_size": 41}), tmp_path / "adapter")
    with pytest.raises(ConfigError, match="tensorboard with dp_epsilon"):
        train(memory, preset("private", **SMALL), tmp_path / "adapter", tensorboard=True)


def test_a_memory_without_pairs(memory, tmp_path):
    class Empty:
        pairs, path = 0, "empty"

    with pytest.raises(AdapterError, match="empty contains no pairs to train on"):
        private.train_privately(Empty(), preset("private", **SMALL), tmp_path, None)


def test_what_is_not_finite_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(training, "verify", lambda *_: None)
    memory = make_memory(tmp_path / "memory", nan_at=4)
    with pytest.raises(AdapterError, match=r"the representation of pair \d+ \(of \d+; step \d+ of its example\)"):
        train(memory, preset("private", **SMALL | {"batch_size": 40}), tmp_path / "adapter")


def test_training_that_diverges(memory, tmp_path):
    config = preset("private", **SMALL | {"learning_rate": 1e38, "warmup": 0.0, "epochs": 20})
    with pytest.raises(AdapterError, match=r"the gradient is not finite at step \d+: training diverged"):
        train(memory, config, tmp_path / "adapter")


def test_no_schedule_is_fitted(trained):
    adapter = trained[1][0]
    assert adapter.config.fitted is None
    with pytest.raises(ConfigError, match="no fitted schedule belongs to an adapter of private training"):
        adapter.config.choose_schedule("fitted")


def test_training_teaches_where_noise_is_small(tmp_path):
    memory = make_memory(tmp_path / "memory", examples=400, used=9)
    changes = {"dp_epsilon": 50.0, "batch_size": 100, "epochs": 15, "learning_rate": 1e-2}
    adapter, _ = train(memory, preset("private", **SMALL | changes), tmp_path / "adapter")
    f, y = rows(memory.view())
    head = memory.head()
    before = cross_entropy(head.logits(f), y)
    assert float(cross_entropy(head.logits(adapter(f)), y)) < 0.8 * float(before)


def test_the_figures_say_what_was_spent(trained):
    _, (adapter, figures) = trained
    assert figures["epsilon"] <= 3.0
    assert figures["epsilon"] == epsilon_spent(figures["noise_multiplier"], 1e-3, 0.25, 8)
    assert (figures["delta"], figures["clip_norm"], figures["sampling_rate"], figures["steps"]) == (1e-3, 1.0, 0.25, 8)
    assert (figures["unit"], figures["examples"]) == ("example", 40)
    assert figures["accountant"].startswith("PRV of Opacus ")
    assert adapter.config.training["figures"] == {k: v for k, v in figures.items() if k != "train_seconds"}


def test_the_folder_tells_nothing_else_of_the_data(memory, trained):
    folder, _ = trained
    assert sorted(p.name for p in folder.iterdir()) == ["README.md", "adapter_config.json", "adapter_model.safetensors"]
    told = json.dumps(read_json(folder / "adapter_config.json")) + (folder / "README.md").read_text(encoding="utf-8")
    assert memory.manifest.to_dict()["digest"] not in told
    assert not {"memory", "pairs", "train_seconds"} & set(read_json(folder / "adapter_config.json")["pema"]["training"])
    for word in ("cross-entropy", "training pairs", "seconds"):
        assert word not in told
    card = (folder / "README.md").read_text(encoding="utf-8")
    for line in ("| epsilon spent | 2.", "| unit | example |", "| delta | 0.001 |", "| accountant | PRV of Opacus"):
        assert line in card


def test_two_trainings_differ_in_their_noise(memory, trained, tmp_path):
    again, _ = train(memory, preset("private", **SMALL), tmp_path / "again")
    assert not torch.equal(again.B_pd, trained[1][0].B_pd)


def test_a_finished_private_run_is_returned_as_it_is(memory, trained):
    folder, (adapter, _) = trained
    again, figures = train(memory, preset("private", **SMALL), folder, resume=True)
    assert torch.equal(again.A, adapter.A)
    assert figures["epsilon"] <= 3.0
    with pytest.raises(MismatchError, match=r"was made with dp_epsilon=3.0, this run has dp_epsilon=2.0"):
        train(memory, preset("private", **SMALL | {"dp_epsilon": 2.0}), folder, resume=True)


def test_killed_before_any_call_it_ends_the_same(memory, tmp_path):
    assert start(memory.path, tmp_path / "unbroken", "private")
    calls = 0
    while not start(memory.path, tmp_path / "adapter", "private", after_calls=calls):
        calls += 3
    assert calls >= 15
    for name in ("adapter_model.safetensors", "README.md"):
        assert without_time((tmp_path / "adapter" / name).read_bytes()) == without_time(
            (tmp_path / "unbroken" / name).read_bytes()
        )
    assert not (tmp_path / "adapter" / "checkpoint").exists()


def without_time(content):
    return b"\n".join(line for line in content.split(b"\n") if b'"time":' not in line)


def test_older_settings_without_privacy_still_resume():
    settings = TrainConfig().to_dict()
    for name in ("dp_epsilon", "dp_delta"):
        assert settings.pop(name) is None
    training.require_same_run(settings, "digest", TrainConfig(), "digest", "the checkpoint")
    assert TrainConfig.from_dict(settings) == TrainConfig()


def test_private_settings_survive_json():
    config = preset("private", **SMALL)
    assert TrainConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert replace(config, dp_epsilon=1).dp_epsilon == 1.0
    assert PRIVATE_SETTINGS["dp_epsilon"] == 3.0


def test_the_examples_of_a_view_are_whole(memory):
    view = View(memory, np.array([3, 17]))
    (batch,) = view.batches(view.pairs)
    assert int((batch.steps == 0).sum()) == 2
