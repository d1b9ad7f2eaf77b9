"""P = lambda P_PEMA + (1 - lambda) P_LM, in log space and float32."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from pema.adapter.copying import Copied


def mix(log_p_plm: Tensor, log_p_pema: Tensor, weights: Tensor) -> Tensor:
    """Return the mixture log P = log(lambda P_PEMA + (1 - lambda) P_LM).

    The result is exact at lambda 0 and 1, where one of the inputs is returned unchanged; -inf in either input means a
    probability of 0.

    Args:
        log_p_plm: (..., V) log P_LM.
        log_p_pema: (..., V) log P_PEMA; -inf for tokens outside the adapter's vocabulary.
        weights: (...), lambda in [0, 1].

    Returns:
        (..., V) float32.
    """
    log_rest, log_weight = log_weights(weights)[..., None, :].unbind(-1)
    return torch.logaddexp(log_p_plm.float() + log_rest, log_p_pema.float() + log_weight)


def log_weights(weights: Tensor) -> Tensor:
    """Map (...) lambda to (..., 2) float32: log(1 - lambda) and log(lambda), -inf for a weight of 0."""
    weights = weights.double()
    return torch.stack((torch.log1p(-weights), torch.log(weights)), dim=-1).float()


def mix_logits(logits: Tensor, log_rest: Tensor, log_weight: Tensor) -> Tensor:
    """Mix the stacked logits of both distributions; return logits with the PLM's own zero point.

    The softmax of the result is P. The result is log P plus the log-sum-exp of the PLM's logits: at lambda = 0 these
    come out unchanged, and the logits are continuous where a schedule reaches 0. Logits processors that depend on the
    zero point (a repetition penalty uses the sign) therefore treat all steps in the same way.

    Args:
        logits: (batch, 2 k, V): the PLM's for k positions, then the adapter's for the same k positions.
        log_rest: (batch, k, 1), log(1 - lambda).
        log_weight: (batch, k, 1), log(lambda).

    Returns:
        (batch, k, V) float32.
    """
    k = log_rest.shape[1]
    plm = logits[:, :k]
    log_p = torch.log_softmax(logits, dim=-1, dtype=torch.float32)
    log_plm, log_pema = log_p[:, :k], log_p[:, k:]
    log_pema.add_(log_weight + _zero_point(plm, log_plm))
    # Reuse the memory of log_plm: allocating a new (batch, k, V) costs as much as the computation.
    return torch.logaddexp(torch.add(plm, log_rest, out=log_plm), log_pema)


def mix_logits_of(tokens: Tensor, logits: Tensor, pema_logits: Tensor, log_rest: Tensor, log_weight: Tensor) -> Tensor:
    """Mix logits as `mix_logits` does where P_PEMA covers a few tokens only: the rest of V is scaled, not mixed.

    Args:
        tokens: (V',) int64, the tokens that P_PEMA covers.
        logits: (batch, k, V), the PLM's.
        pema_logits: (batch, k, V'), the adapter's.
        log_rest: as in `mix_logits`.
        log_weight: as in `mix_logits`.

    Returns:
        (batch, k, V) float32, as in `mix_logits`.
    """
    log_p = torch.log_softmax(logits, dim=-1, dtype=torch.float32)
    zero_point = _zero_point(logits, log_p)
    mixed = torch.add(logits, log_rest, out=log_p)
    pema = torch.log_softmax(pema_logits, dim=-1, dtype=torch.float32).add_(log_weight + zero_point)
    return mixed.index_copy_(-1, tokens, torch.logaddexp(mixed.index_select(-1, tokens), pema))


def mix_logits_with_copies(logits: Tensor, copied: Copied, log_rest: Tensor, log_weight: Tensor) -> Tensor:
    """Mix logits as `mix_logits` does, with P_PEMA = g P_copy + (1 - g) softmax(W_hd h_pd).

    Args:
        logits: as in `mix_logits`.
        copied: g and P_copy at the batch x k positions.
        log_rest: as in `mix_logits`.
        log_weight: as in `mix_logits`.

    Returns:
        (batch, k, V) float32, as in `mix_logits`.
    """
    rows, k = log_rest.shape[:2]
    zero_point = torch.logsumexp(logits[:, :k].float(), dim=-1, keepdim=True)
    by_token, log_g_rest = (each.to(logits.device).view(rows, k, -1) for each in (copied.by_token(), copied.log_rest))
    mixed = mix_logits(logits, log_rest, log_weight + log_g_rest)
    ids = copied.keys.ids.to(logits.device)
    return mixed.index_copy_(-1, ids, torch.logaddexp(mixed.index_select(-1, ids), by_token + log_weight + zero_point))


def _zero_point(logits: Tensor, log_p: Tensor) -> Tensor:
    """Return the log-sum-exp of the logits, (..., 1), computed at the most probable token, which is never -inf."""
    return logits.amax(dim=-1, keepdim=True) - log_p.amax(dim=-1, keepdim=True)
