"""Which short cuts hold for a model: tried on first use against the plain forward pass; the rest are not used."""

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
from pema.owner.derivation import evaluating, hooked
from pema.owner.local.encoded import cached, whole
from pema.owner.local.greedy import greedy
from pema.owner.local.growing import Growing
from pema.owner.local.prefix import Prefix
from pema.owner.local.running import Runner
from pema.owner.weights import device_of

logger = logging.getLogger(__name__)

_UNFIT = (AssertionError, AttributeError, LookupError, NotImplementedError, RuntimeError, TypeError, ValueError)
"""What the code of an architecture raises where a short cut does not fit it."""

_DEVICE = ("memory", "ALLOC_FAILED", "CUDA error", "HIP error", "cuDNN error")
"""Words of a RuntimeError that tells of the machine's state, not of the architecture."""

_LIMITS, _TWICE = (4, 1, 3), (4, 1, 3, 2, 3, 1)
"""Steps of the rows of the trial, so that rows leave at different times."""

_SPAN = 64
"""Longest window or chunk of attention that the trial goes beyond."""

_TRIAL = 13
"""Tokens of the longest sequence in the shortest trial, with what is generated."""


class ShortCuts:
    """Padding, the key-value cache and a shared prefix, each true or false for one model; the log says what is not."""

    def __init__(self, runner: Runner, longest: int) -> None:
        self._runner = runner
        self._longest = longest

    @cached_property
    def padding(self) -> bool:
        """Whether rows of different length may go through the model together."""
        return self._holds(
            "padding",
            lambda: torch.split(
                self._runner.teacher(self._trial, [4] * 3, None), [len(row) - 3 for row in self._trial]
            ),
            lambda: self._alone,
        )

    @cached_property
    def teacher_prefix(self) -> bool:
        """Whether whole sequences may share the cache of their beginning."""

        def attempt() -> Sequence[Tensor]:
            rows = [row[3:] for row in self._trial]
            return torch.split(self._runner.teacher(rows, [1] * 3, self._prefix()), [len(row) for row in rows])

        return self.padding and self._holds("the shared prefix", attempt, lambda: self._alone)

    @cached_property
    def cache(self) -> bool:
        """Whether decoding may keep keys and values, with padding on the left."""
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
        """Whether decoding may keep keys and values, or another state, for rows of one length."""
        return self.padding and self._holds(
            "the key-value cache",
            lambda: self._greedy(cached(self._runner, self._trial * 2, padding=False), _TWICE),
            lambda: self._greedy(whole(self._runner, self._trial * 2, together=True), _TWICE),
        )

    @cached_property
    def generate(self) -> bool:
        """Whether the model's own `generate` gives rows of different length what each has alone."""
        return (
            self.padding
            and not self._runner.positions.varies
            and not self._counts_columns
            and self._holds("the model's own `generate`", self._generated, lambda: self._forced)
        )

    @cached_property
    def greedy_prefix(self) -> bool:
        """Whether decoding may begin from the shared cache of its prompts' beginning."""

        def attempt() -> Sequence[Tensor]:
            prefix = self._prefix()
            if not prefix.movable():
                raise TypeError("its cache is of a kind that is not known")
            return self._greedy(cached(self._runner, self._trial, prefix))

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

    @property
    def _counts_columns(self) -> bool:
        """Whether attention is scaled by the column that a token stands in, as in Llama 4: in steps of thousands."""
        return bool(getattr(self._runner.model.config.get_text_config(), "attn_temperature_tuning", False))

    def _generated(self) -> Sequence[Tensor]:
        """What stands at the tap while the model generates what it is made to, (steps, d_tap) for each row."""
        model, width = self._runner.model, max(map(len, self._trial))
        tokens, mask = pad_left(self._trial, width)
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
            )
        return list(torch.stack(seen, 1))

    @property
    @torch.inference_mode()
    def _forced(self) -> Sequence[Tensor]:
        """The same from plain forward passes."""
        contexts, forced = whole(self._runner, self._trial, together=True), self._trial[0]
        rows = [contexts.run(logits=False)[0]]
        for token in forced[: _LIMITS[0] - 1]:
            contexts.extend(torch.full((len(self._trial),), token, device=rows[0].device), None)
            rows.append(contexts.run(logits=False)[0])
        return list(torch.stack(rows, 1))

    @torch.inference_mode()
    def _greedy(self, contexts: Growing, limits: Sequence[int] = _LIMITS) -> Sequence[Tensor]:
        return [f for f, _ in greedy(contexts, limits, self._runner.eos)]

    @cached_property
    def _trial(self) -> list[list[int]]:
        """Three short sequences of different length with a common beginning, to try short cuts on."""
        model, eos, more = self._runner.model, self._runner.eos, self._more
        size, count = model.get_input_embeddings().weight.shape[0], 20 + 3 * more
        words = torch.randint(0, size, (count,), generator=torch.Generator().manual_seed(6)).tolist()
        words = [w for w in words if w not in eos and w != getattr(model.config, "pad_token_id", None)] or [0]
        words = (words * count)[:count]
        common, own = words[:4], iter(words[4:])
        return [common + [next(own) for _ in range(n + more)] for n in (5, 2, 3)]

    @property
    def _more(self) -> int:
        """By how many tokens the trial is longer, so that it leaves small windows and chunks of attention behind.

        Large ones are not tried: they work as small ones do. The rows are of one position encoding.
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
        """The first row of the trial by itself: without padding there is no mask, so that is another path."""
        return self._greedy(cached(self._runner, self._trial[:1]), _LIMITS[:1])

    @cached_property
    def _greedy_truth(self) -> Sequence[Tensor]:
        return self._greedy(whole(self._runner, self._trial, together=True))


def _passing(error: Exception) -> bool:
    """Whether an error is not of the architecture, so that the next try may succeed.

    The machine was short of something, or pema itself refuses: an adapter is attached, say.
    """
    kinds = [getattr(torch, name, PemaError) for name in ("OutOfMemoryError", "AcceleratorError")]
    said = isinstance(error, RuntimeError) and any(words in str(error) for words in _DEVICE)
    return said or isinstance(error, (PemaError, *kinds))
