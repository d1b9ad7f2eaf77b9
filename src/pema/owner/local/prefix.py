"""The common prefix of all contexts (the instruction): its keys and values, computed once for all batches."""

from __future__ import annotations

import copy

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer


class Prefix:
    """The key-value cache of the first `length` tokens, for one row.

    Attributes:
        length: number of tokens of the prefix.
    """

    def __init__(self, cache: DynamicCache, length: int) -> None:
        self.length = length
        self._cache = cache

    @staticmethod
    def understands(cache: Cache | None) -> bool:
        """Return whether every cache layer is plain: keys and values (1, heads, tokens, width), nothing else."""
        return (
            cache is not None
            and type(cache) is DynamicCache
            and len(cache.layers) > 0
            and all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in cache.layers)
            and all(layer.is_initialized and layer.keys.dim() == 4 for layer in cache.layers)
        )

    def movable(self) -> bool:
        """Return whether every layer still has the whole prefix (a sliding window drops tokens that left it)."""
        return all(layer.keys.shape[-2] == self.length for layer in self._cache.layers)

    def expanded(self, rows: int) -> DynamicCache:
        """Expand the cache to `rows` rows, without a copy of the keys and values."""
        cache = self._copy()
        for layer in cache.layers:
            layer.keys = layer.keys.expand(rows, -1, -1, -1)
            layer.values = layer.values.expand(rows, -1, -1, -1)
        return cache

    def shifted(self, by: Tensor) -> DynamicCache:
        """Expand the cache to len(by) rows, with row i shifted by[i] positions to the right.

        The tokens lost on the right are run again in front of the row's other tokens; the positions gained on the left
        are padding. A row's tokens are thus contiguous, as positions, windows and ALiBi require.

        Args:
            by: (rows,) int64, each at most `length`.
        """
        cache = self._copy()
        for layer in cache.layers:
            source = torch.arange(self.length, device=layer.keys.device) - by.to(layer.keys.device)[:, None]
            source = source.clamp_min(0)
            layer.keys = layer.keys[0][:, source].transpose(0, 1)
            layer.values = layer.values[0][:, source].transpose(0, 1)
        return cache

    def _copy(self) -> DynamicCache:
        cache = copy.copy(self._cache)
        cache.layers = [copy.copy(layer) for layer in self._cache.layers]
        return cache
