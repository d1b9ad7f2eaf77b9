"""Inspection of one generation: both next-token distributions, their mixture and its weight at every step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pema.adapter.copying import context_tokens
from pema.adapter.schedule import Schedule
from pema.adapter.task import require_task
from pema.errors import ConfigError
from pema.generation.decoding import ends_of, token_limit
from pema.generation.mixture import mix
from pema.generation.steps import Weights
from pema.generation.texts import finished, stopped
from pema.pages.inspector.surface import Surface, surfaces
from pema.tasks.spelling import speller_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from pema.adapter.module import Adapter
    from pema.owner.contract import PLM
    from pema.tasks.registry import Task

CANDIDATES = 50
"""Number of tokens of each distribution stored per step; a page then has about 4 kB per step."""

SHOWN = 5
"""Number of tokens of each distribution that the page shows."""


@dataclass(frozen=True)
class Distribution:
    """A next-token distribution: its candidates, and a summary of all other tokens.

    Attributes:
        log_p: log-probability of each candidate, in the order of `Step.candidates`; -inf if it is impossible.
        rest_mass: probability of all other tokens together.
        rest_log_p: log-probability of the likeliest of them; -inf if there is none.
    """

    log_p: tuple[float, ...]
    rest_mass: float
    rest_log_p: float

    def to_json(self) -> dict[str, Any]:
        """Return JSON-ready values; null represents -inf."""
        return {
            "log_p": [_number(value) for value in self.log_p],
            "rest_mass": float(f"{self.rest_mass:.6g}"),
            "rest_log_p": _number(self.rest_log_p),
        }


@dataclass(frozen=True)
class Step:
    """The distributions that decided one generated token.

    Attributes:
        token: the generated token y_t, the likeliest of the mixture.
        weight: lambda_t.
        candidates: token ids, ascending: the likeliest of P_LM, of P_PEMA and of the mixture.
        surfaces: text to show for each candidate.
        plm: P_LM.
        pema: P_PEMA.
    """

    token: int
    weight: float
    candidates: tuple[int, ...]
    surfaces: tuple[Surface, ...]
    plm: Distribution
    pema: Distribution

    def to_json(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "token": self.token,
            "weight": self.weight,
            "candidates": list(self.candidates),
            "surfaces": [surface.to_json() for surface in self.surfaces],
            "plm": self.plm.to_json(),
            "pema": self.pema.to_json(),
        }


@dataclass(frozen=True)
class Inspection:
    """A greedy generation with the distributions of every step.

    Attributes:
        plm: name of the PLM.
        source: the input.
        prompt: the prompt's tokens as text.
        output: the generated text, as `generate` returns it.
        source_length: SL, number of tokens of the input.
        ended: whether the text ended with an end token or at a stop string, not at the length limit.
        steps: steps, one per generated token.
    """

    plm: str
    source: str
    prompt: str
    output: str
    source_length: int
    ended: bool
    steps: tuple[Step, ...]

    def to_json(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "plm": self.plm,
            "source": self.source,
            "prompt": self.prompt,
            "output": self.output,
            "source_length": self.source_length,
            "ended": self.ended,
            "steps": [step.to_json() for step in self.steps],
        }


@torch.no_grad()
def inspect_generation(
    plm: PLM,
    adapter: Adapter,
    source: str,
    task: Task,
    schedule: Schedule,
    *,
    max_new_tokens: int | None = None,
    stop: Sequence[str] | None = None,
    candidates: int = CANDIDATES,
) -> Inspection:
    """Generate a text greedily, as `pema.generate` does, and record the distributions of every step.

    It works on the PLM's decoding session, so that the result is the same for a PLM in this process, for one on its
    owner's server, and with a masked head.

    Args:
        plm: the PLM.
        adapter: the adapter.
        source: text for the template's slot.
        task: task whose template makes the prompt.
        schedule: the adapter's weight per step.
        max_new_tokens: maximum output length in tokens; None means the adapter's own.
        stop: strings that end the text; None means the adapter's own.
        candidates: number of likeliest tokens of P_LM, of P_PEMA and of the mixture to record per step.

    Raises:
        DataError: the source is blank, or too long for the PLM.
        ConfigError: max_new_tokens is below 1, or there are fewer candidates than the page shows.
        MismatchError: the adapter belongs to another PLM, task or template.
    """
    if max_new_tokens is not None and max_new_tokens < 1:
        raise ConfigError(f"max_new_tokens={max_new_tokens} must be at least 1.")
    if candidates < SHOWN:
        raise ConfigError(f"candidates={candidates} must be at least {SHOWN}, the number that the page shows.")
    adapter.require(plm.description)
    task = require_task(adapter.config, task, plm.tokenizer)
    (prompt,) = task.template.encode_prompts(plm.tokenizer, [source])
    limit = token_limit(1, prompt, plm.description.max_length, max_new_tokens or adapter.config.max_new_tokens)
    stop = adapter.config.stop if stop is None else stop
    head, tokenizer, ends = plm.head(), plm.tokenizer, ends_of(plm, task)
    adapter.to(head.weight.device)
    weights = Weights(schedule, torch.tensor([prompt.source_length]), 1)
    steps: list[Step] = []
    generated: list[int] = []
    session = plm.open_session([prompt.prompt])
    try:
        while True:
            t = len(steps)
            weights.until(t)
            # f is rounded to the head's dtype before the adapter reads it, as in the plug-in.
            f = head.normalise(session.representations.to(head.weight.device)).to(head.weight.dtype)
            log_p_plm = head.logits(f).log_softmax(-1)
            context = None
            if adapter.copying is not None:
                context = context_tokens(speller_of(tokenizer), [prompt.prompt], [generated], adapter.config.frame)
            log_p_pema = adapter.log_probs(f, head, context)
            before = [*prompt.prompt, *generated]
            weight = weights.table(t, t)[:, 0]
            steps.append(_step(tokenizer, before, log_p_plm.cpu()[0], log_p_pema.cpu()[0], weight.cpu()[0], candidates))
            generated.append(steps[-1].token)
            before_stop = stopped(tokenizer, generated, stop) if stop else None
            if before_stop is not None or generated[-1] in ends or len(generated) == limit:
                break
            session.advance(generated[-1:])
    finally:
        session.close()
    output, _, reason = finished(tokenizer, generated, ends, stop or ())
    return Inspection(
        plm=plm.description.name,
        source=source,
        prompt=tokenizer.decode(prompt.prompt, skip_special_tokens=False),
        output=output,
        source_length=prompt.source_length,
        ended=reason != "length",
        steps=tuple(steps),
    )


def _step(
    tokenizer: PreTrainedTokenizerBase,
    before: Sequence[int],
    log_p_plm: Tensor,
    log_p_pema: Tensor,
    weight: Tensor,
    candidates: int,
) -> Step:
    """Build a step from (V,) log P_LM, (V,) log P_PEMA and lambda_t, after the tokens `before`."""
    mixed = mix(log_p_plm, log_p_pema, weight)
    best = min(candidates, len(mixed))
    likeliest = [log_p.topk(best).indices for log_p in (log_p_plm, log_p_pema, mixed)]
    kept = torch.tensor(sorted(set(torch.cat(likeliest).tolist())))
    return Step(
        token=int(mixed.argmax()),
        weight=float(weight),
        candidates=tuple(kept.tolist()),
        surfaces=tuple(surfaces(tokenizer, before, kept.tolist())),
        plm=_distribution(log_p_plm, kept),
        pema=_distribution(log_p_pema, kept),
    )


def _distribution(log_p: Tensor, kept: Tensor) -> Distribution:
    rest = torch.ones_like(log_p, dtype=torch.bool).index_fill_(0, kept, False)
    others = log_p[rest].double()
    return Distribution(
        log_p=tuple(log_p[kept].tolist()),
        rest_mass=float(others.exp().sum()),
        rest_log_p=float(others.max()) if len(others) else -math.inf,
    )


def _number(log_p: float) -> float | None:
    """Round a log-probability to six decimals, a relative error of 1e-6 of the probability; None for -inf."""
    return None if log_p == -math.inf else round(log_p, 6)
