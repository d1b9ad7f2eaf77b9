"""Whether one system is better than another: paired bootstrap resampling (Koehn 2004), for every metric."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from pema.errors import ConfigError
from pema.evaluation.score import Array, Metric, Score, require_aligned

SAMPLES = 1000
SEED = 12345
"""SacreBLEU's seed: with it, both resample the same segments."""


@dataclass(frozen=True)
class Comparison:
    """A system against a baseline.

    Attributes:
        baseline: score of the baseline.
        system: score of the system.
        difference: system - baseline.
        low: lower end of the 95 % interval of the difference.
        high: its upper end.
        p_value: probability, were both equally good, of a difference at least this large, in either direction.
        signature: how the comparison was made.
    """

    baseline: Score
    system: Score
    difference: float
    low: float
    high: float
    p_value: float
    signature: str


def paired_bootstrap(
    metric: Metric,
    baseline: Sequence[str],
    system: Sequence[str],
    references: Sequence[str],
    *,
    samples: int = SAMPLES,
    seed: int = SEED,
) -> Comparison:
    """Compare two systems on resamples of the same test set.

    Each sample draws as many segments as there are, with replacement, and scores both systems on them. The p-value is
    two-sided: the share of samples whose difference lies at least |difference| from the mean of all samples, counting
    the observed one. Equal outputs give p = 1. (sacreBLEU's own test takes absolute differences before it centres them,
    which is one-sided and gives equal systems the smallest p.)

    Args:
        metric: from `pema.evaluation.evaluate.get_metric`.
        baseline: hypotheses of the baseline.
        system: hypotheses of the system.
        references: aligned with both.
        samples: the number of resamples.
        seed: of the resampling.

    Raises:
        DataError: the texts are not aligned, or there are none.
        ConfigError: no samples are asked for.
    """
    if samples < 1:
        raise ConfigError(f"samples {samples} compares nothing: give 1 or more.")
    require_aligned(baseline=baseline, system=system, references=references)
    statistics = [metric.statistics(hypotheses, references) for hypotheses in (baseline, system)]
    scores = [Score(metric.value(each.sum(0)), metric.signature(each.sum(0))) for each in statistics]
    resampled = resample(metric, statistics, samples, seed)
    found = _difference(resampled[1] - resampled[0], scores[1].value - scores[0].value)
    return Comparison(
        baseline=scores[0],
        system=scores[1],
        **vars(found),
        signature=f"paired bootstrap|n:{len(references)}|samples:{samples}|seed:{seed}|p:two-sided|interval:95%",
    )


@dataclass(frozen=True)
class Interval:
    """A system's score, the mean over its runs.

    Attributes:
        mean: over the runs.
        std: sample standard deviation over the runs; None where there is one.
        low: lower end of the 95 % interval of the mean, over resamples of the test set.
        high: its upper end.
    """

    mean: float
    std: float | None
    low: float
    high: float


@dataclass(frozen=True)
class Difference:
    """A system's mean score less the reference's; see `Comparison` for the fields."""

    difference: float
    low: float
    high: float
    p_value: float


def compare_means(
    metric: Metric,
    systems: Mapping[str, Sequence[Sequence[str]]],
    references: Sequence[str],
    against: Sequence[str],
    *,
    samples: int = SAMPLES,
    seed: int = SEED,
) -> tuple[dict[str, Interval], dict[tuple[str, str], Difference]]:
    """Compare systems of several runs each (seeds of training) on resamples of the same test set.

    A system's score on a resample is the mean over its runs, so the intervals are those of `paired_bootstrap` for a
    mean; they say how much the choice of test sentences matters, and `std` how much the seed does.

    Args:
        metric: from `pema.evaluation.evaluate.get_metric`.
        systems: the hypotheses of each system's runs.
        references: aligned with all of them.
        against: the systems that all others are compared with.
        samples: the number of resamples.
        seed: of the resampling.

    Returns:
        Every system's interval, and every difference by (system, the one it is compared with).

    Raises:
        DataError: the texts are not aligned, or there are none.
    """
    means, found = {}, {}
    for name, runs in systems.items():
        for run in runs:
            require_aligned(**{name: run, "references": references})
        statistics = [metric.statistics(run, references) for run in runs]
        values = [metric.value(each.sum(0)) for each in statistics]
        means[name] = np.mean(resample(metric, statistics, samples, seed), axis=0)
        low, high = np.percentile(means[name], [2.5, 97.5])
        std = float(np.std(values, ddof=1)) if len(values) > 1 else None
        found[name] = Interval(float(np.mean(values)), std, float(low), float(high))
    differences = {}
    for other, name in itertools.product(against, systems):
        if name != other:
            difference = found[name].mean - found[other].mean
            differences[name, other] = _difference(means[name] - means[other], difference)
    return found, differences


def _difference(resampled: Array, difference: float) -> Difference:
    # A difference that equals the observed one but for rounding counts as reached.
    reached = np.abs(resampled - resampled.mean()) >= abs(difference) - 1e-9
    low, high = np.percentile(resampled, [2.5, 97.5])
    return Difference(difference, float(low), float(high), float((reached.sum() + 1) / (len(resampled) + 1)))


def resample(metric: Metric, statistics: Sequence[Array], samples: int, seed: int) -> list[Array]:
    """Scores of each system, (samples,), on the same resamples of its statistics, (n, k)."""
    n = len(statistics[0])
    random = np.random.default_rng(seed)
    scores = [np.empty(samples) for _ in statistics]
    for i in range(samples):
        drawn = random.integers(0, n, n)
        times = np.bincount(drawn, minlength=n).astype(np.float64)
        for found, each in zip(scores, statistics, strict=True):
            found[i] = metric.value(times @ each)
    return scores
