"""The fitted schedule: the mixture weight per relative position that makes held-out targets most likely."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from pema.adapter.likelihood import log_ratio, maximise
from pema.adapter.schedule import Fitted, relative_bin
from pema.errors import ConfigError
from pema.schema import require

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
    require("bins", bins, int, least=1, most=10_000)
    require("prior_pairs", prior_pairs, float, least=0.0)
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
