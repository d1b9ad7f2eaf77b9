"""Greedy decoding of a batch: the contexts of `predicted` mode."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pema.owner.local.growing import GrowingContexts

_DROP = 8
"""Finished rows are removed when they are at least one in this many, so that the copy pays off."""


@torch.inference_mode()
def greedy(contexts: GrowingContexts, limits: Sequence[int], eos: Sequence[int]) -> list[tuple[Tensor, Tensor]]:
    """Decode greedily until an end-of-sequence token, or for limits[i] steps.

    Returns:
        Per row (n, d_tap) representations and the (n,) tokens chosen by the PLM after each, on the CPU.
    """
    f, logits = contexts.run(logits=True)
    device = logits.device
    limit, ends = torch.tensor(limits, device=device), torch.tensor(eos, dtype=torch.long, device=device)
    active = torch.arange(len(limits), device=device)
    count = torch.zeros(len(limits), dtype=torch.long, device=device)
    chosen = torch.zeros(len(limits), int(limit.max()), dtype=torch.long, device=device)
    store = torch.zeros(*chosen.shape, f.shape[-1], dtype=f.dtype, device=f.device)
    for step in range(chosen.shape[1]):
        token = logits.float().argmax(-1)
        store[active.to(f.device), step] = f
        chosen[active, step] = token
        ended = (count[active] > 0) | torch.isin(token, ends) | (step + 1 >= limit[active])
        count[active] = torch.where(ended & (count[active] == 0), step + 1, count[active])
        finished = int(ended.sum())
        if finished == len(active):
            break
        keep = None
        if finished * _DROP >= len(active):
            keep = (~ended).nonzero()[:, 0]
            active, token = active[keep], token[keep]
        contexts.extend(token, keep)
        f, logits = contexts.run(logits=True)
    counts = count.tolist()
    wanted = torch.cat([torch.arange(n) + i * chosen.shape[1] for i, n in enumerate(counts)])
    representations = torch.split(store.flatten(0, 1).index_select(0, wanted.to(store.device)).cpu(), counts)
    words = chosen.cpu()
    return [(f, words[i, : counts[i]].clone()) for i, f in enumerate(representations)]
