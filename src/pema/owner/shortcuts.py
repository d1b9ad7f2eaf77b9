"""Which short cuts hold for a model: tried on first use against the plain forward pass; the rest are not used."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import cached_property

import torch
from torch import Tensor

from pema.owner.derivation import evaluating, output_embedding
from pema.owner.greedy import greedy
from pema.owner.growing import CachedContexts, WholeContexts
from pema.owner.prefix import Prefix
from pema.owner.running import Runner

logger = logging.getLogger(__name__)

_UNFIT = (AssertionError, AttributeError, LookupError, NotImplementedError, RuntimeError, TypeError, ValueError)
"""What the code of an architecture raises where a short cut does not fit it."""

_DEVICE = ("memory", "ALLOC_FAILED", "CUDA error", "HIP error", "cuDNN error")
"""Words of a RuntimeError that tells of the machine's state, not of the architecture."""


class ShortCuts:
    """Padding, the key-value cache and a shared prefix, each true or false for one model; the log says what is not."""

    def __init__(self, runner: Runner) -> None:
        self._runner = runner

    @cached_property
    def padding(self) -> bool:
        """Whether rows of different length may go through the model together."""
        return self._holds(
            "padding",
            lambda: torch.split(self._runner.teacher(self._trial, [4] * 3, None), [5, 2, 3]),
            lambda: self._alone,
        )

    @cached_property
    def teacher_prefix(self) -> bool:
        """Whether whole sequences may share the cache of their beginning."""

        def attempt() -> Sequence[Tensor]:
            rows = [row[3:] for row in self._trial]
            return torch.split(self._runner.teacher(rows, [1] * 3, self._prefix()), [5, 2, 3])

        return self.padding and self._holds("the shared prefix", attempt, lambda: self._alone)

    @cached_property
    def cache(self) -> bool:
        """Whether decoding may keep keys and values, with padding on the left."""
        return self.padding and self._holds(
            "the key-value cache", lambda: self._greedy(None), lambda: self._greedy_truth
        )

    @cached_property
    def greedy_prefix(self) -> bool:
        """Whether decoding may begin from the shared cache of its prompts' beginning."""

        def attempt() -> Sequence[Tensor]:
            prefix = self._prefix()
            if not prefix.movable():
                raise TypeError("its cache is of a kind that is not known")
            return self._greedy(prefix)

        return self.cache and self._holds("the shared prefix", attempt, lambda: self._greedy_truth)

    def _holds(self, what: str, attempt: Callable[[], Sequence[Tensor]], truth: Callable[[], Sequence[Tensor]]) -> bool:
        """Whether a short cut computes what the plain forward pass does."""
        model = self._runner.model
        with evaluating(model):
            expected = truth()
            try:
                found = attempt()
                worst = max(
                    ((a.float() - b.float()).abs().max() / b.float().abs().max().clamp_min(1e-6)).item()
                    for a, b in zip(found, expected, strict=True)
                )
            except _UNFIT as error:
                if _passing(error):
                    raise
                logger.warning("%s: %s is not used: %s", type(model).__name__, what, error)
                return False
        # A wrong mask or position moves representations by their own magnitude; half precision by a few hundredths.
        good = worst < (1e-3 if output_embedding(model).weight.dtype == torch.float32 else 0.1)
        if not good:
            logger.warning(
                "%s: %s is not used, it moves representations by %.1e of their magnitude.",
                type(model).__name__,
                what,
                worst,
            )
        return good

    def _prefix(self) -> Prefix:
        prefix = self._runner.prefix(self._trial[0][:3])
        if prefix is None:
            raise TypeError("its cache is of a kind that is not known")
        return prefix

    def _greedy(self, prefix: Prefix | None) -> Sequence[Tensor]:
        with torch.inference_mode():
            contexts = CachedContexts(self._runner, self._trial, prefix)
        return [f for f, _ in greedy(contexts, [4, 1, 3], self._runner.eos)]

    @cached_property
    def _trial(self) -> list[list[int]]:
        """Three short sequences of different length with a common beginning, to try short cuts on."""
        model, eos = self._runner.model, self._runner.eos
        size = model.get_input_embeddings().weight.shape[0]
        words = torch.randint(0, size, (20,), generator=torch.Generator().manual_seed(6)).tolist()
        words = [w for w in words if w not in eos and w != getattr(model.config, "pad_token_id", None)] or [0]
        words = (words * 20)[:20]
        return [words[:4] + words[4:9], words[:4] + words[10:12], words[:4] + words[12:15]]

    @cached_property
    def _alone(self) -> list[Tensor]:
        return [self._runner.teacher([row], [4], None) for row in self._trial]

    @cached_property
    def _greedy_truth(self) -> list[Tensor]:
        contexts = WholeContexts(self._runner, self._trial, together=True)
        return [f for f, _ in greedy(contexts, [4, 1, 3], self._runner.eos)]


def _passing(error: Exception) -> bool:
    """Whether an error says that the machine was short of something, so that the next try may succeed."""
    kinds = tuple(kind for name in ("OutOfMemoryError", "AcceleratorError") if (kind := getattr(torch, name, None)))
    return isinstance(error, kinds) or (isinstance(error, RuntimeError) and any(w in str(error) for w in _DEVICE))
