"""P = lambda P_PEMA + (1 - lambda) P_LM, in log space and float32."""

from __future__ import annotations

import torch
from torch import Tensor


def mix(log_p_plm: Tensor, log_p_pema: Tensor, weights: Tensor) -> Tensor:
    """The mixture: log P = log(lambda P_PEMA + (1 - lambda) P_LM).

    Exact at lambda 0 and 1, where one part is returned as it is; -inf on either side means a probability of 0.

    Args:
        log_p_plm: (..., V) log P_LM.
        log_p_pema: (..., V) log P_PEMA; -inf where the adapter has no such token.
        weights: (...), lambda in [0, 1].

    Returns:
        (..., V) float32.
    """
    log_rest, log_weight = log_weights(weights)[..., None, :].unbind(-1)
    return torch.logaddexp(log_p_plm.float() + log_rest, log_p_pema.float() + log_weight)


def log_weights(weights: Tensor) -> Tensor:
    """(...) lambda -> (..., 2) float32: log(1 - lambda), log(lambda), -inf for a part of no weight."""
    weights = weights.double()
    return torch.stack((torch.log1p(-weights), torch.log(weights)), dim=-1).float()


def mix_logits(logits: Tensor, log_weights: Tensor) -> Tensor:
    """`mix` on the stacked logits of both distributions: one normalisation for both, then one pass over V.

    Args:
        logits: (batch, 2 k, V): the PLM's for k positions, then the adapter's for the same k positions.
        log_weights: (batch, 2 k, 1): log(1 - lambda) for the former, log(lambda) for the latter.

    Returns:
        (batch, k, V) float32, log P.
    """
    weighted = torch.log_softmax(logits, dim=-1, dtype=torch.float32).add_(log_weights)
    plm, pema = weighted.chunk(2, dim=1)
    return torch.logaddexp(plm, pema)


def mix_logits_of(tokens: Tensor, logits: Tensor, pema_logits: Tensor, log_weights: Tensor) -> Tensor:
    """`mix_logits` where P_PEMA is over a few tokens only: the rest of V is scaled, not mixed.

    Args:
        tokens: (V',) int64, the tokens that P_PEMA is over.
        logits: (batch, k, V), the PLM's.
        pema_logits: (batch, k, V'), the adapter's.
        log_weights: (batch, 2 k, 1), as in `mix_logits`.

    Returns:
        (batch, k, V) float32, log P.
    """
    log_rest, log_weight = log_weights.chunk(2, dim=1)
    mixed = torch.log_softmax(logits, dim=-1, dtype=torch.float32).add_(log_rest)
    pema = torch.log_softmax(pema_logits, dim=-1, dtype=torch.float32).add_(log_weight)
    return mixed.index_copy_(-1, tokens, torch.logaddexp(mixed.index_select(-1, tokens), pema))
