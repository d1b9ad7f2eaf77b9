"""Perplexity of the stored targets under the PLM, the adapter, or their mixture, computed without the PLM."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from pema.adapter.likelihood import log_p, log_p_pema
from pema.adapter.module import Adapter
from pema.adapter.schedule import Schedule
from pema.errors import ConfigError
from pema.generation.mixture import mix
from pema.memory.buffer import Batch
from pema.memory.reader import Memory, View
from pema.owner.head import Head

LOGITS_BYTES = 64 << 20
"""Maximum memory of the float32 logits of one distribution, in bytes."""


def perplexity(view: View, head: Head, adapter: Adapter | None = None, schedule: Schedule | None = None) -> float:
    """Compute exp(-mean log P(y)) over the pairs of a memory.

    P is P_LM without an adapter, P_PEMA with an adapter alone, and lambda_t P_PEMA + (1 - lambda_t) P_LM with an
    adapter and a schedule. The contexts are those that the memory was built with: with `teacher` contexts this is the
    usual perplexity per target token, end-of-sequence included.

    Returns:
        A number from 1 to infinity.

    Raises:
        ConfigError: a schedule is given without an adapter, or the view has no pairs.
    """
    total, count = 0.0, 0
    for piece in target_log_probs(view, head, adapter, schedule):
        total += float(piece.sum())
        count += len(piece)
    if not count:
        raise ConfigError("perplexity needs pairs, and this view has none: choose a view with at least one pair.")
    return math.exp(min(-total / count, 709.0)) if math.isfinite(total) else math.inf


def target_log_probs(
    view: View, head: Head, adapter: Adapter | None = None, schedule: Schedule | None = None
) -> Iterator[Tensor]:
    """Yield log P(y) of the pairs of a memory, in its order, in tensors of (b,); see `perplexity`."""
    if schedule is not None and adapter is None:
        raise ConfigError("a schedule needs an adapter, which it weights against the PLM: give the adapter too.")
    training = adapter is not None and adapter.training
    if adapter is not None:
        adapter.eval()
    try:
        for batch in view.batches(max(16, LOGITS_BYTES // (4 * head.vocabulary_size))):
            yield _log_probs(view.memory, batch, head, adapter, schedule).cpu()
    finally:
        if adapter is not None:
            adapter.train(training)


@torch.no_grad()
def _log_probs(memory: Memory, batch: Batch, head: Head, adapter: Adapter | None, schedule: Schedule | None) -> Tensor:
    device = head.weight.device
    f, y = batch.representations.to(device), batch.targets.to(device)
    if adapter is None:
        return log_p(head, f, y)
    log_pema = log_p_pema(adapter, head, f, y, adapter.context(memory, batch.rows))
    if schedule is None:
        return log_pema
    # The mixture acts on each token separately, so (b, 1) is enough instead of (b, V).
    weights = schedule.weights(batch.steps, batch.source_lengths).to(device)
    return mix(log_p(head, f, y)[:, None], log_pema[:, None], weights)[:, 0]
