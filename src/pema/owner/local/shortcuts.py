"""Shortcuts of a model, verified on first use against the plain forward pass; those that fail are not used."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import cached_property

import torch
from torch import Tensor
from transformers import GenerationConfig

from pema.errors import PemaError
from pema.owner.batching import pad_left
from pema.owner.causal_lm import output_embedding
from pema.owner.local.encoded import cached, whole
from pema.owner.local.greedy import greedy
from pema.owner.local.growing import GrowingContexts
from pema.owner.local.prefix import Prefix
from pema.owner.local.running import Runner
from pema.owner.probing import evaluating, hooked
from pema.owner.weights import device_of

logger = logging.getLogger(__name__)

_UNFIT = (AssertionError, AttributeError, LookupError, NotImplementedError, RuntimeError, TypeError, ValueError)
"""Exceptions from the code of an architecture that does not support a shortcut."""

_DEVICE = ("memory", "ALLOC_FAILED", "CUDA error", "HIP error", "cuDNN error")
"""Words in a RuntimeError caused by the machine's state, not by the architecture."""

_LIMITS, _TWICE = (4, 1, 3), (4, 1, 3, 2, 3, 1)
"""Number of steps per row of the trial, so that rows end at different times."""

_SPAN = 64
"""Longest attention window or chunk that the trial exceeds."""

_TRIAL = 13
"""Tokens of the longest sequence in the shortest trial, including generated tokens."""


class ShortCuts:
    """The shortcuts (padding, key-value cache, shared prefix) that are exact for a model; the others are logged."""

    def __init__(self, runner: Runner, longest: int) -> None:
        self._runner = runner
        self._longest = longest

    @cached_property
    def padding(self) -> bool:
        """Whether rows of different lengths may share a forward pass."""
        return self._holds(
            "padding",
            lambda: torch.split(
                self._runner.teacher(self._trial, [4] * 3, None), [len(row) - 3 for row in self._trial]
            ),
            lambda: self._alone,
        )

    @cached_property
    def teacher_prefix(self) -> bool:
        """Whether whole sequences may share the cache of their common prefix."""

        def attempt() -> Sequence[Tensor]:
            rows = [row[3:] for row in self._trial]
            return torch.split(self._runner.teacher(rows, [1] * 3, self._prefix()), [len(row) for row in rows])

        return self.padding and self._holds("the shared prefix", attempt, lambda: self._alone)

    @cached_property
    def cache(self) -> bool:
        """Whether decoding may cache keys and values, with padding on the left."""
        return (
            self.padding
            and not self._counts_columns
            and self._holds(
                "the key-value cache for rows of different length",
                lambda: [*self._greedy(cached(self._runner, self._trial)), *self._first_alone],
                lambda: [*self._greedy_truth, self._greedy_truth[0]],
            )
        )

    @cached_property
    def unpadded_cache(self) -> bool:
        """Whether decoding may cache keys and values, or another state, for rows of equal length."""
        return self.padding and self._holds(
            "the key-value cache",
            lambda: self._greedy(cached(self._runner, self._trial * 2, padding=False), _TWICE),
            lambda: self._greedy(whole(self._runner, self._trial * 2, together=True), _TWICE),
        )

    @cached_property
    def generate(self) -> bool:
        """Whether the model's own `generate` gives rows of different lengths the result of each alone."""
        return (
            self.padding
            and not self._runner.positions.varies
            and not self._counts_columns
            and self._holds("the model's own `generate`", lambda: self._generated(self._trial), lambda: self._forced)
        )

    @cached_property
    def generate_prefix(self) -> bool:
        """Whether the model's own `generate` may start from the cache of the prompts' common prefix."""

        def attempt() -> Sequence[Tensor]:
            prefix = self._movable()
            return [*self._generated(self._trial, prefix), *self._generated(self._trial[:1], prefix)]

        return self.generate and self._holds(
            "the shared prefix in `generate`", attempt, lambda: [*self._forced, self._forced[0]]
        )

    @cached_property
    def greedy_prefix(self) -> bool:
        """Whether decoding may start from the cache of the prompts' common prefix."""

        def attempt() -> Sequence[Tensor]:
            return self._greedy(cached(self._runner, self._trial, self._movable()))

        return self.cache and self._holds("the shared prefix", attempt, lambda: self._greedy_truth)

    def _holds(self, what: str, attempt: Callable[[], Sequence[Tensor]], truth: Callable[[], Sequence[Tensor]]) -> bool:
        """Return whether a shortcut agrees with the plain forward pass."""
        model = self._runner.model
        with evaluating(model):
            expected = truth()
            try:
                actual = attempt()
                worst = max(
                    ((a.float() - b.float()).abs().max() / b.float().abs().max().clamp_min(1e-6)).item()
                    for a, b in zip(actual, expected, strict=True)
                )
            except _UNFIT as error:
                if _passing(error):
                    raise
                logger.warning("%s: %s is not used: %s", type(model).__name__, what, error)
                return False
        # A wrong mask or position changes representations by their magnitude, half precision by a few hundredths of it.
        good = worst < (1e-3 if output_embedding(model).weight.dtype == torch.float32 else 0.1)
        if not good:
            logger.warning(
                "%s: %s is not used, it changes representations by %.1e of their magnitude.",
                type(model).__name__,
                what,
                worst,
            )
        return good

    def _prefix(self) -> Prefix:
        prefix = self._runner.prefix(self._trial[0][:3])
        if prefix is None:
            raise TypeError("its kind of cache is unknown")
        return prefix

    def _movable(self) -> Prefix:
        prefix = self._prefix()
        if not prefix.movable():
            raise TypeError("its kind of cache is unknown")
        return prefix

    @property
    def _counts_columns(self) -> bool:
        """Whether attention is scaled by the column of a token, as in Llama 4 (in steps of thousands)."""
        return bool(getattr(self._runner.model.config.get_text_config(), "attn_temperature_tuning", False))

    def _generated(self, rows: Sequence[Sequence[int]], prefix: Prefix | None = None) -> Sequence[Tensor]:
        """Record the tap while `generate` is forced to produce given tokens, (steps, d_tap) for each row."""
        model, width = self._runner.model, max(map(len, rows))
        tokens, mask = pad_left(rows, width)
        gaps = (mask == 0).sum(-1)
        state = {} if prefix is None else self._runner.state(prefix.shifted(gaps.clamp_max(prefix.length)))
        seen: list[Tensor] = []

        def force(ids: Tensor, scores: Tensor) -> Tensor:
            token = torch.full((len(ids), 1), self._trial[0][ids.shape[1] - width], device=scores.device)
            return torch.full_like(scores, -torch.inf).scatter_(1, token, 0.0)

        handle = self._runner.tapped.register_forward_pre_hook(lambda _m, given: seen.append(given[0][:, -1]))
        with hooked(handle):
            model.generate(
                tokens.to(device_of(model)),
                attention_mask=mask.to(device_of(model)),
                generation_config=GenerationConfig(max_new_tokens=_LIMITS[0], do_sample=False, pad_token_id=0),
                logits_processor=[force],
                **state,
            )
        return list(torch.stack(seen, 1))

    @cached_property
    @torch.inference_mode()
    def _forced(self) -> Sequence[Tensor]:
        """The result of `_generated`, from plain forward passes."""
        contexts, forced = whole(self._runner, self._trial, together=True), self._trial[0]
        rows = [contexts.run(logits=False)[0]]
        for token in forced[: _LIMITS[0] - 1]:
            contexts.extend(torch.full((len(self._trial),), token, device=rows[0].device), None)
            rows.append(contexts.run(logits=False)[0])
        return list(torch.stack(rows, 1))

    @torch.inference_mode()
    def _greedy(self, contexts: GrowingContexts, limits: Sequence[int] = _LIMITS) -> Sequence[Tensor]:
        return [f for f, _ in greedy(contexts, limits, self._runner.eos)]

    @cached_property
    def _trial(self) -> list[list[int]]:
        """Three short sequences of different lengths with a common prefix, to test shortcuts."""
        model, eos, more = self._runner.model, self._runner.eos, self._more
        size, count = model.get_input_embeddings().weight.shape[0], 20 + 3 * more
        words = torch.randint(0, size, (count,), generator=torch.Generator().manual_seed(6)).tolist()
        words = [w for w in words if w not in eos and w != getattr(model.config, "pad_token_id", None)] or [0]
        words = (words * count)[:count]
        common, own = words[:4], iter(words[4:])
        return [common + [next(own) for _ in range(n + more)] for n in (5, 2, 3)]

    @property
    def _more(self) -> int:
        """Number of extra tokens of the trial, so that it exceeds small attention windows and chunks.

        Large ones are not tested: they work like small ones. All rows have the same position encoding.
        """
        settings = self._runner.model.config.get_text_config().to_dict().items()
        spans = [v for k, v in settings if isinstance(v, int) and ("window" in k or "chunk" in k) and v <= _SPAN]
        least, most = max([0, *spans]), min(3 * _SPAN, self._longest - _TRIAL)
        of = self._runner.positions.of
        return next((n for n in range(least, most) if of(6 + n) == of(9 + n)), max(0, min(least, most)))

    @cached_property
    def _alone(self) -> list[Tensor]:
        return [self._runner.teacher([row], [4], None) for row in self._trial]

    @property
    def _first_alone(self) -> Sequence[Tensor]:
        """The first row of the trial alone: without padding there is no mask, which is a different code path."""
        return self._greedy(cached(self._runner, self._trial[:1]), _LIMITS[:1])

    @cached_property
    def _greedy_truth(self) -> Sequence[Tensor]:
        return self._greedy(whole(self._runner, self._trial, together=True))


def _passing(error: Exception) -> bool:
    """Return whether an error is temporary and not due to the architecture, so that the next attempt may succeed.

    The machine was out of resources, or pema refused, for example because an adapter is attached.
    """
    kinds = [getattr(torch, name, PemaError) for name in ("OutOfMemoryError", "AcceleratorError")]
    temporary = isinstance(error, RuntimeError) and any(words in str(error) for words in _DEVICE)
    return temporary or isinstance(error, (PemaError, *kinds))
