"""The fitted schedule: the mixture weight per relative position that makes held-out targets most likely."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from pema.adapter.likelihood import log_ratio, maximise
from pema.adapter.schedule import Fitted, relative_bin
from pema.errors import ConfigError
from pema.processes import ALONE, Processes
from pema.schema import require

if TYPE_CHECKING:
    from pema.adapter.module import Adapter
    from pema.memory.reader import View
    from pema.owner.head import Head

BINS = 16
SPAN = 2.0
PRIOR_PAIRS = 50.0
"""Number of pairs of a bin as which the weight of all pairs counts."""


def fit_schedule(
    adapter: Adapter,
    head: Head,
    view: View,
    bins: int = BINS,
    *,
    span: float = SPAN,
    prior_pairs: float = PRIOR_PAIRS,
    batch_size: int = 512,
    processes: Processes = ALONE,
) -> Fitted:
    """Fit lambda per bin of t / SL on held-out pairs, without the PLM.

    Maximises sum_i log(lambda P_PEMA(y_i | c_i) + (1 - lambda) P_LM(y_i | c_i)) per bin, which is concave in lambda.
    The weight of all pairs together is the prior of every bin, so that a bin of few pairs (or none) does not overfit.

    Args:
        adapter: the adapter, used without dropout.
        head: the head bundle, on the adapter's device.
        view: held-out pairs, on which the adapter was not trained.
        bins: number of equal bins of t / SL in [0, span); the last one is open to the right.
        span: see `Fitted`.
        prior_pairs: number of pairs of a bin as which the weight of all pairs counts.
        batch_size: number of pairs whose logits are in memory at a time.
        processes: several processes compute the likelihood of a part of the pairs each.

    Raises:
        ConfigError: there are no pairs, or bins or prior_pairs is out of range.
    """
    require("bins", bins, int, least=1, most=10_000)
    require("prior_pairs", prior_pairs, float, least=0.0)
    log_ratios, places = [torch.empty(0, dtype=torch.float64)], [torch.empty(0, dtype=torch.int64)]
    was_training = adapter.training
    adapter.eval()
    try:
        for batch in view.share(processes).batches(batch_size, device=head.weight.device):
            context = adapter.context(view.memory, batch.rows)
            log_ratios.append(log_ratio(adapter, head, batch.representations, batch.targets, context))
            places.append(relative_bin(batch.steps, batch.source_lengths, bins, span))
    finally:
        adapter.train(was_training)
    ratios, bin_of_pair = processes.gather(torch.cat(log_ratios)), processes.gather(torch.cat(places))
    if not len(ratios):
        raise ConfigError("a fitted schedule needs held-out pairs, and there are none: raise dev_fraction.")
    together = maximise(ratios, torch.zeros_like(bin_of_pair), 1)
    values = maximise(ratios, bin_of_pair, bins, prior=together, prior_pairs=prior_pairs)
    return Fitted(tuple(values.tolist()), span)
