import random

import numpy as np
import pytest
from sacrebleu.metrics import BLEU, CHRF
from sacrebleu.significance import PairedTest

from pema.errors import ConfigError, DataError
from pema.evaluation.answers import exact_match
from pema.evaluation.evaluate import get_metric
from pema.evaluation.formality import FormalityAccuracy
from pema.evaluation.significance import compare_means, paired_bootstrap, resample

WORDS = ["the", "cat", "sat", "on", "the", "mat", "and", "saw", "a", "small", "house", "near", "the", "river"]


def corpus(n=60):
    chance = random.Random(0)
    references = [" ".join(chance.choices(WORDS, k=9)) for _ in range(n)]

    def spoil(share):
        return [" ".join(w if chance.random() > share else "blub" for w in text.split()) for text in references]

    return references, spoil(0.5), spoil(0.3)


def test_resamples_and_scores_are_sacrebleus(monkeypatch):
    monkeypatch.setenv("SACREBLEU_SEED", "12345")
    references, baseline, system = corpus()
    metrics = {"bleu": BLEU(), "chrf": CHRF()}
    test = PairedTest([("baseline", baseline), ("system", system)], metrics, [references], "bs", 50)
    _, theirs = test()
    for name, column in (("bleu", "BLEU"), ("chrf", "chrF2")):
        metric = get_metric(name)
        statistics = [metric.statistics(texts, references) for texts in (baseline, system)]
        ours = resample(metric, statistics, 50, 12345)
        # The baseline's own interval there comes from other resamples, so only the system's is compared.
        assert ours[1].mean() == pytest.approx(theirs[column][1].mean, abs=1e-6)
        assert paired_bootstrap(metric, baseline, system, references, samples=50).system.value == pytest.approx(
            theirs[column][1].score
        )


def test_paired_bootstrap_equals_a_slow_loop():
    references, baseline, system = corpus(20)
    found = paired_bootstrap(get_metric("bleu"), baseline, system, references, samples=30, seed=3)
    generator = np.random.default_rng(3)
    differences = []
    for _ in range(30):
        drawn = generator.integers(0, 20, 20)
        one, two, gold = ([texts[i] for i in drawn] for texts in (baseline, system, references))
        differences.append(BLEU().corpus_score(two, [gold]).score - BLEU().corpus_score(one, [gold]).score)
    observed = BLEU().corpus_score(system, [references]).score - BLEU().corpus_score(baseline, [references]).score
    centre = sum(differences) / 30
    reached = sum(abs(d - centre) >= abs(observed) for d in differences)
    assert found.difference == pytest.approx(observed)
    assert found.p_value == pytest.approx((reached + 1) / 31)
    assert (found.low, found.high) == pytest.approx(tuple(np.percentile(differences, [2.5, 97.5])))
    assert found.system.value - found.baseline.value == found.difference
    assert found.system.signature.startswith("BLEU|nrefs:1")
    assert found.signature == "paired bootstrap|n:20|samples:30|seed:3|p:two-sided|interval:95%"


def test_a_clear_difference_and_none():
    references, baseline, system = corpus()
    clear = paired_bootstrap(get_metric("chrf"), baseline, system, references, samples=200)
    assert clear.p_value < 0.05
    assert 0 < clear.low < clear.difference < clear.high
    back = paired_bootstrap(get_metric("chrf"), system, baseline, references, samples=200)
    assert (back.p_value, back.difference, back.low) == (clear.p_value, -clear.difference, pytest.approx(-clear.high))
    same = paired_bootstrap(get_metric("bleu"), system, list(system), references, samples=50)
    assert (same.p_value, same.difference, same.low, same.high) == (1.0, 0.0, 0.0, 0.0)


def test_p_values_are_uniform_where_systems_are_equally_good():
    chance = np.random.default_rng(0)
    references = ["yes"] * 100
    small = 0
    for trial in range(100):
        one, two = (["yes" if right else "no" for right in chance.random(100) < 0.5] for _ in range(2))
        small += paired_bootstrap(exact_match(), one, two, references, samples=100, seed=trial).p_value <= 0.1
    assert 2 <= small <= 20


def test_formality():
    metric = FormalityAccuracy(["[F]Sie[/F]"] * 40, ["[F]du[/F]"] * 40)
    found = paired_bootstrap(metric, ["du"] * 30 + ["Sie"] * 10, ["Sie"] * 35 + ["du"] * 5, ["x"] * 40, samples=100)
    assert found.difference == 35 / 40 - 10 / 40
    assert found.p_value < 0.05


def test_seed_decides():
    references, baseline, system = corpus()
    one, two, other = (
        paired_bootstrap(exact_match(), baseline, system, references, samples=20, seed=seed) for seed in (1, 1, 2)
    )
    assert one == two
    assert one.signature != other.signature


def test_what_cannot_be_compared():
    with pytest.raises(ConfigError, match="samples must be at least 1, not 0"):
        paired_bootstrap(exact_match(), ["a"], ["a"], ["a"], samples=0)
    with pytest.raises(DataError, match="not aligned: 1 baseline, 2 system, 1 references"):
        paired_bootstrap(exact_match(), ["a"], ["a", "b"], ["a"])


def test_means_of_one_run_each_are_the_paired_bootstrap():
    references, baseline, system = corpus()
    metric = get_metric("bleu")
    single = paired_bootstrap(metric, baseline, system, references, samples=200)
    intervals, differences = compare_means(metric, {"a": [baseline], "b": [system]}, references, ["a"], samples=200)
    assert intervals["b"].mean == single.system.value
    assert intervals["b"].std is None
    assert vars(differences["b", "a"]) == {name: getattr(single, name) for name in vars(differences["b", "a"])}
    assert set(differences) == {("b", "a")}


def test_a_mean_over_runs_is_resampled_with_all_of_them():
    references, low, _ = corpus()
    metric = get_metric("f1")
    right = list(references)
    intervals, _ = compare_means(metric, {"both": [right, low]}, references, [], samples=300)
    alone, _ = compare_means(metric, {"one": [low]}, references, [], samples=300)
    both, one = intervals["both"], alone["one"]
    assert both.mean == pytest.approx((100 + one.mean) / 2)
    assert both.low == pytest.approx((100 + one.low) / 2)
    assert both.high == pytest.approx((100 + one.high) / 2)
    assert both.std == pytest.approx((100 - one.mean) / 2**0.5)


def test_systems_that_are_not_aligned_are_refused():
    with pytest.raises(DataError, match="not aligned"):
        compare_means(get_metric("bleu"), {"short": [["one"]]}, ["one", "two"], None)
