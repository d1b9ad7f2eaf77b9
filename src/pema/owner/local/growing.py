"""Contexts that grow by one token at a time: with a key-value cache, or run from the start at every step."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import Cache
from transformers.cache_utils import DynamicCache, DynamicLayer

from pema.owner.batching import pad_left, pad_right
from pema.owner.causal_lm import state_of
from pema.owner.local.prefix import Prefix
from pema.owner.local.running import Runner
from pema.owner.weights import device_of


class GrowingContexts(Protocol):
    """The contexts of one batch."""

    def run(self, *, logits: bool) -> tuple[Tensor, Tensor]:
        """Run the new tokens: return f (rows, d_tap) and the PLM's logits (rows, V), or (rows, 0) without `logits`."""

    def extend(self, tokens: Tensor, parents: Tensor | None) -> None:
        """Replace row i by row parents[i] (None: row i), extended by tokens[i]."""

    @property
    def held_bytes(self) -> int:
        """Bytes kept between two steps."""

    def joinable(self) -> CachedContexts | None:
        """Return the contexts for `CachedContexts.run_together`; None if the next step must be run separately."""


class CachedContexts:
    """Contexts with cached keys and values; rows are padded on the left, so that all end in the same column.

    Attributes:
        runner: runs the model.
        encoding: the position encoding of all rows, now and after every step.
    """

    def __init__(self, runner: Runner, rows: Sequence[Sequence[int]], prefix: Prefix | None = None) -> None:
        self.runner = runner
        self.encoding = runner.positions.of(max(map(len, rows)))
        self._cache: Any = None
        if prefix is None:
            tokens, mask = pad_left(rows, max(map(len, rows)))
        else:
            width = max(map(len, rows)) - prefix.length
            gaps = torch.tensor([max(map(len, rows)) - len(row) for row in rows])
            # A shorter row runs the end of the prefix again in front of its tokens.
            tokens, _ = pad_left([row[-width:] for row in rows], width)
            mask = (torch.arange(prefix.length + width) >= gaps[:, None]).long()
            self._cache = prefix.shifted(gaps.clamp_max(prefix.length))
        self._padded = not bool(mask.all())
        positions = (mask.cumsum(-1) - 1).clamp_min(0)[:, -tokens.shape[1] :]
        device = device_of(runner.model)
        self._tokens, self._mask, self._positions = tokens.to(device), mask.to(device), positions.to(device)

    def run(self, *, logits: bool) -> tuple[Tensor, Tensor]:
        """Run the new tokens; see `GrowingContexts.run`."""
        arguments: dict[str, Any] = {"use_cache": True, **self.runner.state(self._cache)}
        if self._padded:  # some models assume that a mask means padding among the new tokens
            arguments["attention_mask"] = self._mask
        if self.runner.takes_positions:
            arguments["position_ids"] = self._positions
        head = (lambda x: x[..., -1:, :]) if logits else None
        f, output = self.runner.forward(self._tokens, lambda x: x[:, -1], head=head, **arguments)
        self._cache = state_of(output)
        return f, output.logits[:, -1] if logits else f.new_empty(len(f), 0)

    def extend(self, tokens: Tensor, parents: Tensor | None) -> None:
        """Extend the rows; see `GrowingContexts.extend`."""
        if parents is not None:
            _select_rows(self._cache, parents)
            self._mask, self._positions = self._mask[parents], self._positions[parents]
        self._tokens = tokens[:, None]
        self._positions = self._positions[:, -1:] + 1
        self._mask = torch.cat([self._mask, self._mask.new_ones(len(tokens), 1)], dim=1)

    @property
    def held_bytes(self) -> int:
        """Bytes of keys, values and other state in the cache's layers."""
        return sum(tensor.nbytes for tensor in _tensors(self._cache))

    def joinable(self) -> CachedContexts | None:
        """Return these contexts if every layer has complete keys and values, and nothing else."""
        plain = type(self._cache) is DynamicCache and all(type(layer) is DynamicLayer for layer in self._cache.layers)
        return self if plain else None

    @classmethod
    def run_together(cls, parts: Sequence[CachedContexts]) -> list[Tensor]:
        """Run the next token of several batches in one forward pass: return (rows, d_tap) for each.

        All have the same position encoding. Their caches are stacked, padded on the left. Each row attends to the same
        tokens as in a separate pass; only the padding differs.
        """
        runner, width = parts[0].runner, max(part._mask.shape[1] for part in parts)
        mask = torch.cat([nn.functional.pad(part._mask, (width - part._mask.shape[1], 0)) for part in parts])
        cache = copy.copy(parts[0]._cache)
        cache.layers = [
            _below_one_another([part._cache.layers[i] for part in parts], width - 1) for i in range(len(cache.layers))
        ]
        arguments: dict[str, Any] = {"attention_mask": mask, "use_cache": True, **runner.state(cache)}
        if runner.takes_positions:
            arguments["position_ids"] = torch.cat([part._positions for part in parts])
        f, output = runner.forward(torch.cat([part._tokens for part in parts]), lambda x: x[:, -1], **arguments)
        rows = [len(part._tokens) for part in parts]
        for i, layer in enumerate(state_of(output).layers):
            news = (torch.split(tensor[:, :, -1:], rows) for tensor in (layer.keys, layer.values))
            for part, key, value in zip(parts, *news, strict=True):
                own = part._cache.layers[i]
                own.keys, own.values = torch.cat((own.keys, key), -2), torch.cat((own.values, value), -2)
        return list(torch.split(f, rows))


WHOLE_TOKENS = 8192
"""Maximum tokens of whole contexts per forward pass, including padding."""


class WholeContexts:
    """Contexts that are run from their first token at every step: slow, but correct for every causal model.

    Attributes:
        together: whether rows of different lengths may share a forward pass.
    """

    def __init__(self, runner: Runner, rows: Sequence[Sequence[int]], *, together: bool) -> None:
        self.runner = runner
        self._contexts = [list(row) for row in rows]
        self.together = together

    def run(self, *, logits: bool) -> tuple[Tensor, Tensor]:
        """Run the new tokens; see `GrowingContexts.run`."""
        results = [self._run(batch, logits) for batch in self._batches()]
        return torch.cat([f for f, _ in results]), torch.cat([words for _, words in results])

    def _batches(self) -> Iterator[list[list[int]]]:
        """Yield the contexts in order, in batches that fit into one pass: a session's rows grow without limit."""
        begin = longest = 0
        for end, context in enumerate(self._contexts):
            longest = max(longest, len(context))
            if end > begin and (not self.together or (end + 1 - begin) * longest > WHOLE_TOKENS):
                yield self._contexts[begin:end]
                begin, longest = end, len(context)
        yield self._contexts[begin:]

    def _run(self, contexts: list[list[int]], logits: bool) -> tuple[Tensor, Tensor]:
        tokens = pad_right(contexts)
        wanted = torch.arange(len(contexts)) * tokens.shape[1] + torch.tensor([len(c) - 1 for c in contexts])

        def pick(x: Tensor) -> Tensor:
            return x.flatten(0, -2).index_select(0, wanted.to(x.device))

        head = (lambda x: pick(x)[None]) if logits else None
        f, output = self.runner.forward(tokens, pick, head=head, use_cache=False)
        return f, output.logits[0] if logits else f.new_empty(len(f), 0)

    def extend(self, tokens: Tensor, parents: Tensor | None) -> None:
        """Extend the rows; see `GrowingContexts.extend`."""
        rows = range(len(self._contexts)) if parents is None else parents.tolist()
        pairs = zip(rows, tokens.tolist(), strict=True)
        self._contexts = [[*self._contexts[row], token] for row, token in pairs]

    @property
    def held_bytes(self) -> int:
        """Bytes of the tokens (8 per token)."""
        return 8 * sum(map(len, self._contexts))

    def joinable(self) -> None:
        """Return None: there is no cache to join."""


def _below_one_another(layers: Sequence[DynamicLayer], width: int) -> DynamicLayer:
    """Stack the rows of several layers, each padded on the left to `width` positions."""
    merged = copy.copy(layers[0])
    for name in ("keys", "values"):
        tensors = [getattr(layer, name) for layer in layers]
        setattr(merged, name, torch.cat([nn.functional.pad(t, (0, 0, width - t.shape[-2], 0)) for t in tensors]))
    return merged


def _tensors(held: object) -> Iterator[Tensor]:
    """Yield all tensors of a cache, in its layers, lists and dictionaries of states."""
    if isinstance(held, Tensor):
        yield held
    elif isinstance(held, dict):
        yield from itertools.chain.from_iterable(map(_tensors, held.values()))
    elif isinstance(held, list | tuple):
        yield from itertools.chain.from_iterable(map(_tensors, held))
    elif hasattr(held, "reorder_cache"):
        yield from _tensors(vars(held))


def _select_rows(cache: Cache, rows: Tensor) -> None:
    # Layers with a recurrent state select rows only in reorder_cache.
    cache.reorder_cache(rows)
