"""Generation with a PLM that gives its likeliest tokens only, in blocks that are accepted as the mixture decides.

The mixture P = lambda_t P_PEMA + (1 - lambda_t) P_API is decoded greedily. Two facts save requests, and change no text:

- A block that the API writes is right up to the first token at which the mixture decides otherwise, because until there
  its distributions are those of the same contexts.
- Where lambda_t P_PEMA of one token is larger than that of any other by more than 1 - lambda_t, this token is chosen
  whatever the API says, and it is not asked.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pema.adapter.copying import context_tokens
from pema.adapter.schedule import Schedule
from pema.console import note, progress
from pema.errors import ConfigError
from pema.generation.config import GenerateConfig
from pema.generation.texts import FinishReason, finished, stopped
from pema.owner.contract import PLM, Proposal, Proposer
from pema.tasks.spelling import speller_of

if TYPE_CHECKING:
    from pema.adapter.module import Adapter
    from pema.tasks.template import EncodedExample

NOTHING = Proposal((), ())


@dataclass(eq=False)
class Row:
    """A text that is being written.

    Attributes:
        prompt: the prompt.
        limit: maximum number of new tokens.
        tokens: the new tokens.
        proposal: what the API proposes after them.
        done: whether the text has ended.
    """

    prompt: EncodedExample
    limit: int
    tokens: list[int] = field(default_factory=list)
    proposal: Proposal = NOTHING
    done: bool = False


class ProposedTexts:
    """Texts of the mixture of an adapter and an API; without an adapter, those of the API alone."""

    def __init__(
        self, plm: PLM, proposer: Proposer, adapter: Adapter | None, schedule: Schedule, ends: Sequence[int]
    ) -> None:
        self._plm, self._proposer, self._adapter, self._schedule = plm, proposer, adapter, schedule
        self._ends = frozenset(ends)
        self._head = None if adapter is None else plm.head()

    def write(self, rows: Sequence[Row], stop: Sequence[str], batch_size: int) -> None:
        """Write all texts to their ends, those of the mixture in batches.

        Raises:
            OwnerError: the API cannot be asked, or the budget does not allow it.
            MismatchError: its answers do not fit the tokenizer.
        """
        with (
            progress("Generating", len(rows), "texts") as advance,
            ThreadPoolExecutor(self._proposer.parallel, "pema-proposals") as pool,
        ):
            if self._adapter is None:
                while active := [row for row in rows if not row.done]:
                    for row, proposal in zip(active, pool.map(self._ask, active), strict=True):
                        self._accept(row, proposal.tokens, stop)
                        row.done |= not proposal.tokens  # a part of a character at the end
                    advance(sum(row.done for row in active))
                return
            for start in range(0, len(rows), batch_size):
                batch = rows[start : start + batch_size]
                with contextlib.closing(self._proposer.follow([row.prompt.prompt for row in batch])) as follower:
                    while numbers := [n for n, row in enumerate(batch) if not row.done]:
                        f = follower.reach({n: batch[n].tokens for n in numbers})
                        for n in numbers:
                            batch[n].done = n not in f  # its context fills the window
                        if f:
                            self._round([batch[n] for n in f], torch.stack(list(f.values())), stop, pool)
                        advance(sum(batch[n].done for n in numbers))

    def _round(self, active: Sequence[Row], f: Tensor, stop: Sequence[str], pool: ThreadPoolExecutor) -> None:
        """Write a token of each row, given f of their contexts, (rows, d_tap)."""
        log_p, weights = self._predict(active, f)
        asked = [
            row
            for row, p, weight in zip(active, log_p, weights, strict=True)
            if not row.proposal.tokens and not is_certain(p, float(weight))
        ]
        for row, proposal in zip(asked, pool.map(self._ask, asked), strict=True):
            row.proposal = proposal
        for row, p, weight in zip(active, log_p, weights, strict=True):
            tokens, top = row.proposal.tokens, row.proposal.top
            chosen = choose(p, float(weight), top[0] if top else ())
            # The rest of a block is right as long as the mixture decides as the API does.
            row.proposal = Proposal(tokens[1:], top[1:]) if tokens[:1] == (chosen,) else NOTHING
            self._accept(row, [chosen], stop)

    @torch.no_grad()
    def _predict(self, active: Sequence[Row], f: Tensor) -> tuple[Tensor, Tensor]:
        """Return log P_PEMA (rows, V) and lambda (rows,) after the contexts that f belongs to."""
        adapter, head = self._adapter, self._head
        assert adapter is not None
        assert head is not None
        tokens = None
        if adapter.copying is not None:
            prompts = [row.prompt.prompt for row in active]
            written = [row.tokens for row in active]
            tokens = context_tokens(speller_of(self._plm.tokenizer), prompts, written, adapter.config.frame)
        log_p = adapter.log_probs(head.normalise(f.float()), head, tokens)
        steps = torch.tensor([len(row.tokens) for row in active])
        lengths = torch.tensor([row.prompt.source_length for row in active])
        return log_p, self._schedule.weights(steps, lengths).float().broadcast_to(steps.shape)

    def _ask(self, row: Row) -> Proposal:
        count = row.limit - len(row.tokens)
        if self._adapter is not None:
            count = min(count, self._proposer.block)
        return self._proposer.propose(row.prompt.prompt, row.tokens, count)

    def _accept(self, row: Row, tokens: Sequence[int], stop: Sequence[str]) -> None:
        """Append tokens to a row, up to its end."""
        for token in tokens:
            row.tokens.append(token)
            ended = token in self._ends or len(row.tokens) == row.limit
            if ended or (stop and stopped(self._plm.tokenizer, row.tokens, stop) is not None):
                row.done = True
                return


def choose(log_pema: Tensor, weight: float, top: Sequence[tuple[int, float]]) -> int:
    """Return the most probable token of the mixture.

    The probability that the API's likeliest tokens leave is spread evenly over the other tokens, so that P_API is a
    distribution; without any, P_PEMA decides alone.

    Args:
        log_pema: (V,) log P_PEMA.
        weight: lambda.
        top: the API's likeliest tokens with their log-probabilities.
    """
    p = log_pema.exp().double()
    if not top:
        return int(p.argmax())
    ids = torch.tensor([token for token, _ in top])
    p_api = torch.tensor([log_p for _, log_p in top], dtype=torch.float64).exp()
    rest = max(0.0, 1.0 - float(p_api.sum())) / max(len(p) - len(ids), 1)
    p = weight * p
    best_other = p.clone().index_fill_(0, ids, -1.0)
    other = int(best_other.argmax())
    in_top = p[ids] + (1 - weight) * p_api
    place = int(in_top.argmax())
    return int(ids[place]) if float(in_top[place]) >= float(best_other[other]) + (1 - weight) * rest else other


def is_certain(log_pema: Tensor, weight: float) -> bool:
    """Return whether the mixture's most probable token is the same for every distribution of the API."""
    first, second = log_pema.topk(2).values.double().exp().tolist()
    return bool(weight * (first - second) > 1 - weight)


def write_proposed(
    plm: PLM,
    proposer: Proposer,
    adapter: Adapter | None,
    schedule: Schedule,
    prompts: Sequence[EncodedExample],
    limits: Sequence[int],
    ends: Sequence[int],
    config: GenerateConfig,
    further: Mapping[str, Any],
) -> tuple[list[str], int, list[FinishReason]]:
    """Write a text after each prompt: the texts, the number of their tokens, and why each ended.

    Raises:
        ConfigError: sampling, beams or another setting that needs the distribution of all tokens.
        OwnerError, MismatchError: as `ProposedTexts.write`.
    """
    require_greedy(config, further)
    rows = [Row(prompt, limit) for prompt, limit in zip(prompts, limits, strict=True)]
    stop = config.stop or ()
    account = proposer.account()
    try:
        ProposedTexts(plm, proposer, adapter, schedule, ends).write(rows, stop, config.batch_size)
    finally:
        note(account(sum(len(row.tokens) for row in rows)))
    written = [finished(plm.tokenizer, row.tokens, ends, stop) for row in rows]
    return [text for text, _, _ in written], sum(n for _, n, _ in written), [reason for _, _, reason in written]


def require_greedy(config: GenerateConfig, further: Mapping[str, Any]) -> None:
    """Refuse settings that need the probabilities of all tokens.

    Raises:
        ConfigError: names one of them.
    """
    given = {name: value for name, value in further.items() if value}
    if config.num_beams != 1:
        given["num_beams"] = config.num_beams
    if config.do_sample:
        given["do_sample"] = True
    if given:
        name, value = next(iter(given.items()))
        raise ConfigError(
            f"{name}={value} needs the probabilities of all tokens, and an API gives the likeliest ones only: leave it "
            "out; texts are decoded greedily."
        )
