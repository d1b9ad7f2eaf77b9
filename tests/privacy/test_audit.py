"""The attacks and their figures: known answers, and an adapter that has memorised its members."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pema.adapter.config import AdapterConfig
from pema.adapter.module import Adapter
from pema.adapter.presets import preset
from pema.adapter.training import train
from pema.errors import AdapterError, ConfigError, MismatchError
from pema.memory.build import build_memory
from pema.memory.reader import Memory
from pema.memory.sample import take
from pema.privacy import audit as module
from pema.privacy.audit import auc_bound, audit, confidence, likelihood_ratio, mean_log_p, measure, summary
from pema.tasks.example import Example
from pema.tasks.registry import get_task

OVERFITTED = {"rank": 64, "epochs": 30, "batch_size": 16, "learning_rate": 1e-2, "dropout": 0.0, "dev_fraction": 0.0}
WORDS = ("house", "dog", "day", "is", "small", "here", "the", "that", "where")


def sentences(n, seed=0):
    random = np.random.default_rng(seed)
    return [Example(" ".join(random.choice(WORDS, 3)), " ".join(random.choice(WORDS, 3))) for _ in range(n)]


@pytest.fixture(scope="module")
def memories(tiny_plm, tmp_path_factory):
    """Two random halves of one set."""
    folder, plm, examples = tmp_path_factory.mktemp("audit"), tiny_plm("llama"), sentences(24)
    task = get_task("translation")
    return [build_memory(plm, examples[k::2], task, folder / f"half{k}") for k in range(2)]


@pytest.fixture(scope="module")
def adapter(memories, tmp_path_factory):
    return train(memories[0], preset("residual", **OVERFITTED), tmp_path_factory.mktemp("audited") / "adapter")[0]


@pytest.fixture(scope="module")
def found(adapter, memories):
    return audit(adapter, *memories, references=4)


def test_an_adapter_that_learned_by_heart_is_found_out(found):
    for name in ("loss", "plm", "references"):
        attack = found["attacks"][name]
        low, high = attack["auc_interval"]
        assert low <= attack["auc"] <= high
        assert attack["auc"] > 0.9
        assert attack["tpr"] > 0.3
    assert (found["members"], found["non_members"], found["fpr"]) == (12, 12, 1 / 12)
    assert found["signature"]["config"]["references"] == 4
    assert "epsilon" not in found


def test_an_adapter_that_learned_nothing_is_not(memories):
    description = memories[0].manifest.plm
    shape = {"d": description.d, "vocabulary_size": description.vocabulary_size, "rank": 4, "plm": description}
    nothing = Adapter(AdapterConfig(**shape, residual=True))
    attacks = audit(nothing, *memories, references=0)["attacks"]
    assert attacks["plm"]["auc"] == 0.5
    assert set(attacks) == {"loss", "plm"}
    with pytest.raises(AdapterError, match="does not record the settings of its training: audit it with references=0"):
        audit(nothing, *memories, references=2)


def test_the_mean_log_p_is_that_of_a_slow_loop(adapter, memories):
    memory, head = memories[0], memories[0].head()
    (batch,) = memory.view().batches(100_000)
    for one, h in ((adapter, adapter(batch.representations)), (None, batch.representations)):
        log_p = head.logits(h).log_softmax(-1)[torch.arange(len(h)), batch.targets]
        starts = [*(batch.steps == 0).nonzero()[:, 0].tolist(), len(h)]
        expected = [float(log_p[a:b].mean()) for a, b in itertools.pairwise(starts)]
        np.testing.assert_allclose(mean_log_p(memory, head, one), expected, rtol=1e-5)


def test_every_example_is_in_half_of_the_references(adapter, memories, monkeypatch):
    trained = []

    def note_and_return(part, config, folder):
        trained.append((part.examples, config))
        return adapter, {}

    monkeypatch.setattr(module, "train", note_and_return)
    inside, seen = module.reference_log_p(adapter, *memories, 6, 0)
    assert (inside.sum(0) == 3).all()
    assert trained == [(12, preset("residual", **OVERFITTED, vocabulary="full"))] * 6
    assert seen.shape == (6, 24)


def test_a_private_adapter_is_reported_with_its_bound(adapter, memories, monkeypatch):
    training = {"figures": {"epsilon": 1.0, "delta": 1e-3}}
    monkeypatch.setattr(adapter, "config", AdapterConfig(**{**vars(adapter.config), "training": training}))
    result = audit(adapter, *memories, references=0)
    assert result["auc_bound"] == auc_bound(1.0, 1e-3)
    expected = f"{auc_bound(1.0, 1e-3):.3f} (epsilon 1.000, delta 0.001)"
    assert summary(result)["largest AUC that the guarantee allows"] == expected


def test_the_summary_is_one_line_an_attack(found):
    lines = summary(found)
    assert lines["references attack"].startswith("AUC ")
    assert "at FPR 0.083" in lines["loss attack"]


def test_memories_that_do_not_belong(adapter, memories, tiny_plm, tmp_path):
    other = build_memory(tiny_plm("llama", seed=1), sentences(4), get_task("translation"), tmp_path / "other")
    for wrong in ((other, memories[1]), (memories[0], other)):
        with pytest.raises(MismatchError, match="another PLM"):
            audit(adapter, *wrong)
    predicted = build_memory(
        tiny_plm("llama"), sentences(4), get_task("translation"), tmp_path / "predicted", contexts="predicted"
    )
    with pytest.raises(MismatchError, match="contexts"):
        audit(adapter, memories[0], predicted)
    with pytest.raises(ConfigError, match="contains the members again: give examples without training examples"):
        audit(adapter, memories[0], memories[0])


@pytest.mark.parametrize("references", [-2, 3])
def test_references_come_in_pairs(adapter, memories, references):
    with pytest.raises(ConfigError, match=f"references={references} must be an even number"):
        audit(adapter, *memories, references=references)


scores = st.lists(st.integers(0, 5), min_size=2, max_size=12)


@given(scores, scores)
def test_the_figures_are_those_of_all_pairs(members, non_members):
    m, n = np.array(members, float), np.array(non_members, float)
    auc, tpr = module._figures(m, n, 1)
    assert auc == pytest.approx(np.mean([(a > b) + 0.5 * (a == b) for a in m for b in n]))
    thresholds = [t for t in (*n, -math.inf) if (n > t).sum() <= 1]
    assert tpr == max((m > t).mean() for t in thresholds)
    assert module._figures(n, m, 1)[0] == pytest.approx(1 - auc)


def test_the_interval_covers_the_truth(monkeypatch):
    """Scores N(1, 1) and N(0, 1) have an AUC of Phi(1 / sqrt 2)."""
    monkeypatch.setattr(module, "RESAMPLES", 300)
    random, truth, covered = np.random.default_rng(0), 0.76025, 0
    for k in range(40):
        attack = measure(random.normal(1, 1, 60), random.normal(0, 1, 60), 1, seed=k)
        covered += attack.auc_interval[0] <= truth <= attack.auc_interval[1]
    assert covered >= 34


def test_the_likelihood_ratio_is_that_of_the_two_normals():
    inside = np.array([[True, False], [False, True], [True, False], [False, True]])
    references = np.array([[2.0, 0.0], [0.0, 3.0], [4.0, -1.0], [1.0, 1.0]])
    x, sigma = np.array([2.5, 0.5]), 1.7
    normal = lambda x, mu: -((x - mu) ** 2) / (2 * sigma**2)  # noqa: E731
    expected = [
        normal(2.5, 3.0) - normal(2.5, 0.5),
        normal(0.5, 2.0) - normal(0.5, -0.5),
    ]
    np.testing.assert_allclose(likelihood_ratio(x, inside, references) / (2 * sigma**2), expected)


def test_the_confidence_is_the_logit():
    p = np.array([1e-9, 0.3, 0.999])
    np.testing.assert_allclose(confidence(np.log(p)), np.log(p / (1 - p)), rtol=1e-6)
    assert np.isfinite(confidence(np.array([0.0, -100.0]))).all()


def test_the_bound_is_the_area_under_the_most_powerful_roc():
    for epsilon, delta in ((1.0, 0.0), (3.0, 1e-3), (0.1, 0.2)):
        fpr = np.linspace(0, 1, 200_001)
        tpr = np.minimum(np.exp(epsilon) * fpr + delta, 1 - np.exp(-epsilon) * (1 - delta - fpr)).clip(max=1)
        assert auc_bound(epsilon, delta) == pytest.approx(np.trapezoid(tpr, fpr), abs=1e-6)
    assert auc_bound(0.0, 0.0) == 0.5
    assert auc_bound(1.0, 0.0) == pytest.approx(math.e / (1 + math.e))
    assert auc_bound(1e9, 0.0) == pytest.approx(1.0)


def test_taken_examples_are_those_that_were_chosen(memories, tmp_path):
    memory = memories[0]
    part = take(memory, np.array([1, 4, 11]), tmp_path / "part", "test")
    (whole,), (some,) = memory.view().batches(100_000), part.view().batches(100_000)
    number = (whole.steps == 0).cumsum(0) - 1
    chosen = torch.isin(number, torch.tensor([1, 4, 11]))
    assert torch.equal(some.representations, whole.representations[chosen])
    assert torch.equal(some.targets, whole.targets[chosen])
    assert Memory.open(tmp_path / "part").examples == 3
    with pytest.raises(ConfigError, match="exists already"):
        take(memory, np.array([1]), tmp_path / "part", "test")
