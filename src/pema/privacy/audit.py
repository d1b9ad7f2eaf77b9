"""Membership inference: how well an attacker with an adapter distinguishes its training examples from others.

The attacker has the adapter, the head, and the pairs of some examples, members and non-members, and gives every example
a score; a higher score means that a member is more likely. Members and non-members must be exchangeable (a random split
of one set), otherwise the attacks measure the difference between the two sets.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from pema.adapter.config import TrainConfig
from pema.adapter.likelihood import log_p, log_p_pema
from pema.adapter.module import Adapter
from pema.adapter.training import train
from pema.console import note
from pema.errors import AdapterError, ConfigError
from pema.evaluation.notation import bounds_text, metric_name, score_text
from pema.memory.merge import merge
from pema.memory.reader import Memory
from pema.memory.sample import example_lengths, take
from pema.owner.head import Head
from pema.privacy.config import REFERENCES
from pema.signature import signature

Floats = npt.NDArray[np.float64]
Booleans = npt.NDArray[np.bool_]

LEAST_LOG_P = -100.0
"""Minimum of log P_PEMA, used for tokens outside a seen vocabulary."""

FPR = 0.01
RESAMPLES = 2000
BATCH = 512


@dataclass(frozen=True)
class Attack:
    """Success of one attack, with 95 % intervals from a bootstrap over members and over non-members.

    Attributes:
        auc: probability that a member has a higher score than a non-member (ties count half); 0.5 is chance.
        auc_interval: (low, high).
        tpr: share of members with a higher score than all but a share `fpr` of the non-members.
        tpr_interval: (low, high).
    """

    auc: float
    auc_interval: tuple[float, float]
    tpr: float
    tpr_interval: tuple[float, float]


def audit(
    adapter: Adapter, members: Memory, non_members: Memory, *, references: int = REFERENCES, seed: int = 0
) -> dict[str, Any]:
    """Attack an adapter with its owner's knowledge of the training.

    Three attacks: `loss` scores an example by its mean log P_PEMA(y | c) (Yeom et al. 2018); `plm` by the mean of
    log P_PEMA(y | c) - log P_LM(y | c), so that texts that are easy for the PLM do not count; `references` by a
    likelihood ratio against adapters that were and were not trained on the example (LiRA, Carlini et al. 2022, online,
    with one variance), which are trained here with the adapter's own settings on random halves of all examples.

    Args:
        adapter: the adapter.
        members: training examples of the adapter.
        non_members: other examples, similar to the members.
        references: number of reference adapters to train (even); 0 omits that attack.
        seed: seed of the halves and of the bootstrap.

    Returns:
        JSON-ready values: `members`, `non_members`, `fpr` (the false-positive rate of `tpr`: 1 %, or the lowest rate
        for the number of non-members), `attacks` by name, and the signature; for a private adapter also `epsilon`,
        `delta` and `auc_bound`.

    Raises:
        MismatchError: a memory and the adapter belong to different PLMs, or the two memories cannot be merged.
        ConfigError: the memories are identical, or `references` is odd or negative.
        AdapterError: the adapter does not record its settings, which reference adapters need.
        ExternalMemoryError: a memory is damaged.
    """
    for memory in (members, non_members):
        adapter.require(memory.manifest.plm)
    members.manifest.require_same(non_members.manifest, str(non_members.path))
    if members.manifest.to_dict()["digest"] == non_members.manifest.to_dict()["digest"]:
        raise ConfigError(f"{non_members.path} contains the members again: give examples without training examples.")
    if references < 0 or references % 2:
        raise ConfigError(f"references={references} must be an even number: they come in halves and the other halves.")
    head = members.head()
    pema = np.concatenate([mean_log_p(memory, head, adapter) for memory in (members, non_members)])
    plm = np.concatenate([mean_log_p(memory, head, None) for memory in (members, non_members)])
    scores = {"loss": pema, "plm": pema - plm}
    if references:
        inside, seen = reference_log_p(adapter, members, non_members, references, seed)
        scores["references"] = likelihood_ratio(confidence(pema), inside, confidence(seen))
    false_positives = max(1, math.floor(FPR * non_members.examples))
    attacks = {
        name: asdict(measure(score[: members.examples], score[members.examples :], false_positives, seed))
        for name, score in scores.items()
    }
    figures = adapter.config.training.get("figures", {})
    result: dict[str, Any] = {
        "members": members.examples,
        "non_members": non_members.examples,
        "fpr": false_positives / non_members.examples,
        "attacks": attacks,
    }
    if "epsilon" in figures:
        epsilon, delta = figures["epsilon"], figures["delta"]
        result |= {"epsilon": epsilon, "delta": delta, "auc_bound": auc_bound(epsilon, delta)}
    config = {
        "references": references,
        "resamples": RESAMPLES,
        "plm": members.manifest.plm.to_dict(),
        "adapter": adapter.config.training.get("settings", {}),
    }
    return result | {"signature": signature(config, seed)}


@torch.no_grad()
def mean_log_p(memory: Memory, head: Head, adapter: Adapter | None) -> Floats:
    """Return the mean log P_PEMA(y | c) of each example's pairs, (e,); without an adapter the mean log P_LM(y | c)."""
    values = []
    for batch in memory.view().batches(BATCH):
        f = batch.representations
        if adapter is None:
            log_y = log_p(head, f, batch.targets)
        else:
            log_y = log_p_pema(adapter, head, f, batch.targets, adapter.context(memory, batch.rows))
        values.append(log_y.clamp_min(LEAST_LOG_P).numpy())
    lengths = example_lengths(memory)
    starts = np.cumsum(lengths) - lengths
    means: Floats = np.add.reduceat(np.concatenate(values), starts) / lengths
    return means


def reference_log_p(
    adapter: Adapter, members: Memory, non_members: Memory, references: int, seed: int
) -> tuple[Booleans, Floats]:
    """Train pairs of reference adapters, one on a random half of all examples and one on the other half.

    Returns:
        Whether reference k was trained on example e, (k, e), and its mean log P_PEMA of that example, (k, e); members
        first.
    """
    settings = adapter.config.training.get("settings")
    if settings is None:
        raise AdapterError("the adapter does not record the settings of its training: audit it with references=0.")
    config = TrainConfig.from_dict(settings)
    random = np.random.default_rng(seed)
    inside, seen = [], []
    with tempfile.TemporaryDirectory(prefix="pema-audit-") as temporary:
        folder = Path(temporary)
        pool = merge([members.path, non_members.path], folder / "pool")
        head = pool.head()
        for k in range(references):
            if k % 2 == 0:
                half = np.zeros(pool.examples, bool)
                half[random.permutation(pool.examples)[: pool.examples // 2]] = True
            else:
                half = ~half
            note(f"reference adapter {k + 1} of {references} ...")
            part = take(pool, np.flatnonzero(half), folder / f"half{k}", f"reference {k} {seed}")
            reference, _ = train(part, config, folder / f"reference{k}")
            inside.append(half)
            seen.append(mean_log_p(pool, head, reference))
    return np.stack(inside), np.stack(seen)


def confidence(log_probability: Floats) -> Floats:
    """Return log(p / (1 - p)) of log p, any shape: closer to normal than p or log p (Carlini et al. 2022, IV-C)."""
    capped = np.minimum(log_probability, -1e-12)
    logit: Floats = capped - np.log(-np.expm1(capped))
    return logit


def likelihood_ratio(x: Floats, inside: Booleans, references: Floats) -> Floats:
    """Return log(N(x; mu_in, s) / N(x; mu_out, s)) of every example, without the common factor 1 / (2 s^2).

    Args:
        x: (e,) the adapter's confidence in every example.
        inside: (k, e) whether reference k was trained on it; for every example at least one was, and one was not.
        references: (k, e) confidences of the references.
    """
    mu_in = np.where(inside, references, 0).sum(0) / inside.sum(0)
    mu_out = np.where(inside, 0, references).sum(0) / (~inside).sum(0)
    ratio: Floats = (x - mu_out) ** 2 - (x - mu_in) ** 2
    return ratio


def measure(members: Floats, non_members: Floats, false_positives: int, seed: int) -> Attack:
    """Return AUC and true-positive rate of scores (m,) and (n,), at a number of false positives, with intervals."""
    random = np.random.default_rng(seed)
    resampled = np.array(
        [
            _figures(
                random.choice(members, len(members)), random.choice(non_members, len(non_members)), false_positives
            )
            for _ in range(RESAMPLES)
        ]
    )
    auc, tpr = _figures(members, non_members, false_positives)
    (auc_low, tpr_low), (auc_high, tpr_high) = np.quantile(resampled, [0.025, 0.975], axis=0).tolist()
    return Attack(auc, (auc_low, auc_high), tpr, (tpr_low, tpr_high))


def _figures(members: Floats, non_members: Floats, false_positives: int) -> tuple[float, float]:
    rising = np.sort(non_members)
    below, not_above = np.searchsorted(rising, members, "left"), np.searchsorted(rising, members, "right")
    auc = float((below + not_above).mean() / (2 * len(rising)))
    threshold = rising[-1 - false_positives] if false_positives < len(rising) else -np.inf
    return auc, float((members > threshold).mean())


def auc_bound(epsilon: float, delta: float) -> float:
    """Return the largest expected AUC of any attack that (epsilon, delta)-differential privacy allows.

    TPR <= e^epsilon FPR + delta and 1 - FPR <= e^epsilon (1 - TPR) + delta (Kairouz et al. 2015) leave the area below
    the line from (0, delta) over (a, 1 - a), with a = (1 - delta) / (1 + e^epsilon), to (1 - delta, 1).
    """
    a = (1 - delta) / (1 + math.exp(min(epsilon, 700)))
    return a * (delta + 1 - a) / 2 + (1 - delta - a) * (2 - a) / 2 + delta


def summary(result: Mapping[str, Any]) -> dict[str, Any]:
    """Return one line per attack, for humans."""
    lines: dict[str, Any] = {key: result[key] for key in ("members", "non_members")}
    for name, attack in result["attacks"].items():
        figures = ", ".join(figure_text(figure, attack) for figure in ("auc", "tpr"))
        lines[f"{name} attack"] = f"{figures} at FPR {score_text('tpr', result['fpr'])}"
    if "auc_bound" in result:
        bound = f"{score_text('auc', result['auc_bound'])} (epsilon {result['epsilon']:.3f}, delta {result['delta']:g})"
        lines["largest AUC that the guarantee allows"] = bound
    return lines


def figure_text(figure: str, attack: Mapping[str, Any]) -> str:
    """Format the `auc` or the `tpr` of an attack with its name and its interval."""
    bounds = bounds_text(figure, *attack[f"{figure}_interval"])
    return f"{metric_name(figure)} {score_text(figure, attack[figure])} ({bounds})"
