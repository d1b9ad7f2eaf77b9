"""The fitted schedule: the mixture weight per relative position that makes held-out targets most likely."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pema.errors import ConfigError
from pema.generation.schedule import Fitted, relative_bin

if TYPE_CHECKING:
    from pema.adapter.module import Adapter
    from pema.memory.reader import View
    from pema.owner.head import Head

BINS = 16
SPAN = 2.0
PRIOR_PAIRS = 50.0
"""The weight of all pairs together counts as much as this many pairs of a bin."""


def fit_schedule(
    adapter: Adapter,
    head: Head,
    view: View,
    bins: int = BINS,
    *,
    span: float = SPAN,
    prior_pairs: float = PRIOR_PAIRS,
    batch_size: int = 512,
) -> Fitted:
    """Fit lambda per bin of t / SL on held-out pairs; needs no PLM.

    Maximises sum_i log(lambda P_PEMA(y_i | c_i) + (1 - lambda) P_LM(y_i | c_i)) per bin, which is concave in lambda.
    Every bin leans on the weight of all pairs together, so a bin of few pairs (or none) is not fitted to chance.

    Args:
        adapter: the adapter; its dropout is off here.
        head: the head bundle.
        view: held-out pairs, which the adapter was not trained on.
        bins: equal bins of t / SL in [0, span), the last one open.
        span: see `Fitted`.
        prior_pairs: how many pairs of a bin the weight of all pairs counts as.
        batch_size: pairs whose logits are alive at once.

    Raises:
        ConfigError: no pairs, or bins or prior_pairs out of range.
    """
    if bins < 1:
        raise ConfigError(f"A fitted schedule needs at least one bin, not {bins}.")
    if prior_pairs < 0:
        raise ConfigError(f"prior_pairs counts pairs, so it cannot be {prior_pairs}.")
    log_ratios, places = [], []
    was_training = adapter.training
    adapter.eval()
    try:
        for batch in view.batches(batch_size):
            log_ratios.append(log_ratio(adapter, head, batch.representations, batch.targets))
            places.append(relative_bin(batch.steps, batch.source_lengths, bins, span))
    finally:
        adapter.train(was_training)
    if not log_ratios:
        raise ConfigError("A fitted schedule needs held-out pairs, and there are none: raise dev_fraction.")
    ratios, bin_of_pair = torch.cat(log_ratios), torch.cat(places)
    together = maximise(ratios, torch.zeros_like(bin_of_pair), 1)
    values = maximise(ratios, bin_of_pair, bins, prior=together, prior_pairs=prior_pairs)
    return Fitted(tuple(values.tolist()), span)


@torch.no_grad()
def log_ratio(adapter: Adapter, head: Head, f: Tensor, targets: Tensor) -> Tensor:
    """The log of P_PEMA(y) / P_LM(y) for the gold token y.

    Args:
        adapter: the adapter.
        head: the head bundle.
        f: (n, d) head input.
        targets: (n,) y.

    Returns:
        (n,) float64; -inf where P_PEMA has no such token.
    """
    device = head.weight.device
    f, gold = f.to(device), targets.to(device)[:, None]
    logits = head.logits(f)
    log_p_plm = logits.gather(1, gold).double() - logits.logsumexp(-1, keepdim=True).double()
    log_p_pema = adapter.log_probs(f, head).gather(1, gold).double()
    return (log_p_pema - log_p_plm).squeeze(1).cpu()


def maximise(
    log_ratios: Tensor,
    bin_of_pair: Tensor,
    bins: int,
    *,
    prior: Tensor | None = None,
    prior_pairs: float = 0.0,
    tolerance: float = 1e-7,
    most_steps: int = 2000,
) -> Tensor:
    """EM from 1/2 until no weight moves by more than `tolerance`.

    Args:
        log_ratios: (n,) float64, log P_PEMA(y) - log P_LM(y).
        bin_of_pair: (n,) int64.
        bins: how many bins there are.
        prior: (1,) weight that every bin leans on; needed where a bin may be empty.
        prior_pairs: how many pairs it counts as.
        tolerance: the smallest movement that is still followed.
        most_steps: where to stop at the latest.

    Returns:
        (bins,) float64 in [0, 1].
    """
    weights = torch.full((bins,), 0.5, dtype=torch.float64)
    for _ in range(most_steps):
        updated = em_step(weights, log_ratios, bin_of_pair, prior=prior, prior_pairs=prior_pairs)
        moved = float((updated - weights).abs().max())
        weights = updated
        if moved < tolerance:
            break
    return weights


def em_step(
    weights: Tensor,
    log_ratios: Tensor,
    bin_of_pair: Tensor,
    *,
    prior: Tensor | None = None,
    prior_pairs: float = 0.0,
) -> Tensor:
    """One step of EM: lambda becomes the mean probability that the gold token came from P_PEMA.

    E: r_i = lambda P_PEMA(y_i) / (lambda P_PEMA(y_i) + (1 - lambda) P_LM(y_i)). M: lambda = mean of r_i over the bin,
    with `prior_pairs` further pairs of r = prior. A bin of nothing takes the prior, or keeps its weight without one.
    """
    bins = len(weights)
    share = torch.sigmoid(torch.logit(weights)[bin_of_pair] + log_ratios)
    # A weight of exactly 0 or 1 meets a ratio of the other infinity: the weight says which part there is.
    share = torch.where(share.isnan(), weights[bin_of_pair], share)
    total = torch.bincount(bin_of_pair, share, minlength=bins)
    count = torch.bincount(bin_of_pair, minlength=bins).double()
    if prior is not None:
        total, count = total + prior_pairs * prior, count + prior_pairs
        weights = prior.expand(bins)
    return torch.where(count > 0, total / count.clamp(min=1e-300), weights)


def log_likelihood(weights: Tensor, log_ratios: Tensor, bin_of_pair: Tensor) -> Tensor:
    """Sum over pairs of log(lambda P_PEMA(y) / P_LM(y) + 1 - lambda): what EM climbs, up to a constant; ()."""
    weight = weights[bin_of_pair]
    return torch.logaddexp(weight.log() + log_ratios, torch.log1p(-weight)).sum()
