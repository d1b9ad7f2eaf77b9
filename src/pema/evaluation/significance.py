"""Paired bootstrap resampling (Koehn 2004) for all metrics: tests whether one system is better than another."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from pema.errors import ConfigError
from pema.evaluation.score import Array, Metric, Reference, Score, require_aligned, texts_of

SAMPLES = 1000
SEED = 12345
"""SacreBLEU's seed: with it, both packages resample the same segments."""


@dataclass(frozen=True)
class Comparison:
    """Comparison of a system with a baseline.

    Attributes:
        baseline: score of the baseline.
        system: score of the system.
        difference: system - baseline.
        low: lower bound of the 95 % interval of the difference.
        high: upper bound of the interval.
        p_value: probability of a difference at least this large, in either direction, if both were equally good.
        signature: method of the comparison.
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
    references: Sequence[Reference],
    *,
    samples: int = SAMPLES,
    seed: int = SEED,
) -> Comparison:
    """Compare two systems on resamples of the same test set.

    Each sample draws n segments with replacement from the n of the test set, and scores both systems on them. The
    p-value is two-sided: the fraction of samples whose difference is at least |difference| away from the mean of all
    samples, counting the observed one. Equal outputs give p = 1. (sacreBLEU's own test takes absolute differences
    before it centres them, which is one-sided and gives equal systems the smallest p.)

    Args:
        metric: from `pema.evaluation.evaluate.get_metric`.
        baseline: hypotheses of the baseline.
        system: hypotheses of the system.
        references: aligned with both.
        samples: number of resamples.
        seed: random seed of the resampling.

    Raises:
        DataError: the texts are not aligned, or there are none.
        ConfigError: `samples` is below 1.
    """
    if samples < 1:
        raise ConfigError(f"samples must be at least 1, not {samples}.")
    require_aligned(baseline=baseline, system=system, references=references)
    statistics = [metric.statistics(hypotheses, references) for hypotheses in (baseline, system)]
    scores = [Score(metric.value(each.sum(0)), metric.signature(each.sum(0))) for each in statistics]
    resampled = resample(metric, statistics, samples, seed)
    difference = _difference(resampled[1] - resampled[0], scores[1].value - scores[0].value)
    return Comparison(
        baseline=scores[0],
        system=scores[1],
        **vars(difference),
        signature=f"paired bootstrap|n:{len(references)}|samples:{samples}|seed:{seed}|p:two-sided|interval:95%",
    )


@dataclass(frozen=True)
class Interval:
    """Score of a system, the mean over its runs, with its interval.

    Attributes:
        mean: mean over the runs.
        std: sample standard deviation over the runs; None for a single run.
        low: lower bound of the 95 % interval of the mean, over resamples of the test set.
        high: upper bound of the interval.
        texts: minimum number of texts that the value of a run is computed from, if that is not all; else None.
    """

    mean: float
    std: float | None
    low: float
    high: float
    texts: int | None = None


@dataclass(frozen=True)
class Difference:
    """Mean score of a system minus that of the system it is compared with; see `Comparison` for the fields."""

    difference: float
    low: float
    high: float
    p_value: float


def compare_means(
    metric: Metric,
    systems: Mapping[str, Sequence[Sequence[str]]],
    references: Sequence[Reference],
    against: Sequence[str],
    *,
    samples: int = SAMPLES,
    seed: int = SEED,
) -> tuple[dict[str, Interval], dict[tuple[str, str], Difference]]:
    """Compare systems with several runs each (training seeds) on resamples of the same test set.

    A system's score on a resample is the mean over its runs, so the intervals are those of `paired_bootstrap` for a
    mean; they measure the effect of the choice of test sentences, and `std` measures the effect of the seed.

    Args:
        metric: from `pema.evaluation.evaluate.get_metric`.
        systems: the hypotheses of each run, by system.
        references: aligned with all hypotheses.
        against: the systems that all others are compared with.
        samples: number of resamples.
        seed: random seed of the resampling.

    Returns:
        The interval of each system, and the differences by (system, the system it is compared with).

    Raises:
        DataError: the texts are not aligned, or there are none.
    """
    means, intervals = {}, {}
    for name, runs in systems.items():
        for run in runs:
            require_aligned(**{name: run, "references": references})
        statistics = [metric.statistics(run, references) for run in runs]
        totals = [each.sum(0) for each in statistics]
        values = [metric.value(each) for each in totals]
        counts = [texts_of(metric, each, len(references)) for each in totals]
        means[name] = np.mean(resample(metric, statistics, samples, seed), axis=0)
        low, high = np.percentile(means[name], [2.5, 97.5])
        std = float(np.std(values, ddof=1)) if len(values) > 1 else None
        intervals[name] = Interval(float(np.mean(values)), std, float(low), float(high), _least(counts))
    differences = {}
    for other, name in itertools.product(against, systems):
        if name != other:
            difference = intervals[name].mean - intervals[other].mean
            differences[name, other] = _difference(means[name] - means[other], difference)
    return intervals, differences


def _least(counts: Sequence[int | None]) -> int | None:
    return min((count for count in counts if count is not None), default=None)


def _difference(resampled: Array, difference: float) -> Difference:
    # A difference that equals the observed one up to rounding counts as reached.
    reached = np.abs(resampled - resampled.mean()) >= abs(difference) - 1e-9
    low, high = np.percentile(resampled, [2.5, 97.5])
    return Difference(difference, float(low), float(high), float((reached.sum() + 1) / (len(resampled) + 1)))


def resample(metric: Metric, statistics: Sequence[Array], samples: int, seed: int) -> list[Array]:
    """Return the scores of each system, (samples,), on the same resamples of its statistics, (n, k)."""
    n = len(statistics[0])
    random = np.random.default_rng(seed)
    scores = [np.empty(samples) for _ in statistics]
    for i in range(samples):
        drawn = random.integers(0, n, n)
        times = np.bincount(drawn, minlength=n).astype(np.float64)
        for values, each in zip(scores, statistics, strict=True):
            values[i] = metric.value(times @ each)
    return scores
