"""Likelihood of the gold tokens under the PLM, the adapter and their mixture, and the weight that maximises it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from pema.adapter.module import Adapter
    from pema.memory.prompts import ContextTokens
    from pema.owner.head import Head


@torch.no_grad()
def log_p(head: Head, h: Tensor, targets: Tensor, tokens: Tensor | None = None) -> Tensor:
    """Return log softmax(W_hd h) of the gold tokens.

    Args:
        head: the head bundle.
        h: (n, d), f for P_LM or h_pd for P_PEMA.
        targets: (n,) token ids.
        tokens: (V',) sorted ids, if P covers only these.

    Returns:
        (n,) float64; -inf for a target that is not among `tokens`.
    """
    return _gold(head.logits(h, tokens), targets, tokens)


def _gold(logits: Tensor, targets: Tensor, tokens: Tensor | None) -> Tensor:
    """Return log softmax(logits) of the gold tokens (n,) float64, -inf for those that are not among `tokens`."""
    places = targets if tokens is None else torch.searchsorted(tokens, targets).clamp(max=len(tokens) - 1)
    values = logits.gather(1, places[:, None])[:, 0].double() - logits.logsumexp(-1).double()
    return values if tokens is None else values.masked_fill(tokens[places] != targets, -torch.inf)


@torch.no_grad()
def log_p_pema(
    adapter: Adapter, head: Head, f: Tensor, targets: Tensor, context: ContextTokens | None = None
) -> Tensor:
    """Return log P_PEMA(y) of the gold tokens y.

    Args:
        adapter: the adapter.
        head: the head bundle.
        f: (n, d) head input.
        targets: (n,) y.
        context: the tokens of the contexts, for an adapter that copies.

    Returns:
        (n,) float64; -inf if P_PEMA does not cover the token.
    """
    log_vocabulary = _gold(adapter.logits(adapter(f), head), targets, adapter.tokens)
    copied = adapter.copy(f, context, head.weight)
    return log_vocabulary if copied is None else copied.mixed(log_vocabulary, targets)


@torch.no_grad()
def log_ratio(adapter: Adapter, head: Head, f: Tensor, targets: Tensor, context: ContextTokens | None = None) -> Tensor:
    """Return log(P_PEMA(y) / P_LM(y)) of the gold tokens y.

    Args:
        adapter: the adapter.
        head: the head bundle.
        f: (n, d) head input.
        targets: (n,) y.
        context: the tokens of the contexts, for an adapter that copies.

    Returns:
        (n,) float64; -inf if P_PEMA does not cover the token.
    """
    return (log_p_pema(adapter, head, f, targets, context) - log_p(head, f, targets)).cpu()


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
    """Maximise the likelihood per bin by EM, from 1/2 until no weight changes by more than `tolerance`.

    Args:
        log_ratios: (n,) float64, log P_PEMA(y) - log P_LM(y).
        bin_of_pair: (n,) int64.
        bins: number of bins.
        prior: (1,) prior weight of every bin; required if a bin may be empty.
        prior_pairs: number of pairs as which it counts.
        tolerance: largest change of a weight at which EM stops.
        most_steps: maximum number of steps.

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
    """Take one step of EM: lambda becomes the mean probability that the gold token came from P_PEMA.

    E: r_i = lambda P_PEMA(y_i) / (lambda P_PEMA(y_i) + (1 - lambda) P_LM(y_i)). M: lambda = mean of r_i over the bin,
    with `prior_pairs` further pairs of r = prior. An empty bin takes the prior, or keeps its weight without one.
    """
    bins = len(weights)
    share = torch.sigmoid(torch.logit(weights)[bin_of_pair] + log_ratios)
    # With a weight of exactly 0 or 1 an infinite ratio gives NaN: the weight alone decides then.
    share = torch.where(share.isnan(), weights[bin_of_pair], share)
    total = torch.bincount(bin_of_pair, share, minlength=bins)
    count = torch.bincount(bin_of_pair, minlength=bins).double()
    if prior is not None:
        total, count = total + prior_pairs * prior, count + prior_pairs
        weights = prior.expand(bins)
    return torch.where(count > 0, total / count.clamp(min=1e-300), weights)
