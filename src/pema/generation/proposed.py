"""Generation with a PLM that gives its likeliest tokens only, in blocks that are accepted as the mixture decides.

The mixture P = lambda_t P_PEMA + (1 - lambda_t) P_API is decoded greedily. Two facts save requests, and change no text:

- A block that the API writes is right up to the first token at which the mixture decides otherwise, because until there
  its distributions are those of the same contexts.
- Where lambda_t P_PEMA of one token is larger than that of any other by more than 1 - lambda_t, this token is chosen
  whatever the API says, and it is not asked.
"""

from __future__ import annotations

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

AT_ONCE = 64
"""Contexts whose distributions over the vocabulary are in memory at a time."""

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

    def write(self, rows: Sequence[Row], stop: Sequence[str]) -> None:
        """Write all texts to their ends.

        Raises:
            OwnerError: the API cannot be asked, or the budget does not allow it.
            MismatchError: its answers do not fit the tokenizer.
        """
        with (
            progress("Generating", len(rows), "texts") as advance,
            ThreadPoolExecutor(self._proposer.parallel, "pema-proposals") as pool,
        ):
            while active := [row for row in rows if not row.done]:
                if self._adapter is None:
                    for row, proposal in zip(active, pool.map(self._ask, active), strict=True):
                        self._accept(row, proposal.tokens, stop)
                        row.done |= not proposal.tokens  # a part of a character at the end
                else:
                    self._round(active, stop, pool)
                advance(sum(row.done for row in active))

    def _round(self, active: Sequence[Row], stop: Sequence[str], pool: ThreadPoolExecutor) -> None:
        """Write at least one token of each row, or end it where its context no longer fits."""
        for row in active:
            if not self._proposer.fits(row.prompt.prompt, [*row.tokens, *row.proposal.tokens]):
                row.proposal = NOTHING
                row.done = not self._proposer.fits(row.prompt.prompt, row.tokens)
        active = [row for row in active if not row.done]
        if not active:
            return
        log_p, weights = self._predict(active)
        asked = [
            row
            for row, p, weight in zip(active, log_p, weights, strict=True)
            if not row.proposal.tokens and not is_certain(p[0], float(weight[0]))
        ]
        for row, proposal in zip(asked, pool.map(self._ask, asked), strict=True):
            row.proposal = proposal
        for row, p, weight in zip(active, log_p, weights, strict=True):
            proposal, row.proposal = row.proposal, NOTHING
            chosen = []
            for n in range(len(p)):
                top = proposal.top[n] if n < len(proposal.top) else ()
                chosen.append(choose(p[n], float(weight[n]), top))
                if n >= len(proposal.tokens) or chosen[-1] != proposal.tokens[n]:
                    break
            else:
                # The block is right so far; the rest of it needs representations of longer contexts.
                rest = len(p)
                row.proposal = Proposal(proposal.tokens[rest:], proposal.top[rest:])
            self._accept(row, chosen, stop)

    @torch.no_grad()
    def _predict(self, active: Sequence[Row]) -> tuple[list[Tensor], list[Tensor]]:
        """Return log P_PEMA (n, V) and lambda (n,) at the n positions of each row that its proposal reaches."""
        adapter, head = self._adapter, self._head
        assert adapter is not None
        assert head is not None
        counts = [max(1, len(row.proposal.tokens)) for row in active]
        # The token after the last context is not read.
        sequences = [
            [*row.prompt.prompt, *row.tokens, *row.proposal.tokens[: n - 1], 0]
            for row, n in zip(active, counts, strict=True)
        ]
        starts = [len(row.prompt.prompt) for row in active]
        f: list[Tensor] = [torch.empty(0)] * len(active)
        for answer in self._plm.represent(sequences, starts):
            f[answer.index] = answer.representations[-counts[answer.index] :].float()
        contexts = [(row, n) for row, count in zip(active, counts, strict=True) for n in range(count)]
        stacked = torch.cat(f)
        parts = []
        for start in range(0, len(contexts), AT_ONCE):
            part = contexts[start : start + AT_ONCE]
            tokens = None
            if adapter.copying is not None:
                prompts = [row.prompt.prompt for row, _ in part]
                written = [[*row.tokens, *row.proposal.tokens[:n]] for row, n in part]
                tokens = context_tokens(speller_of(self._plm.tokenizer), prompts, written, adapter.config.frame)
            h = head.normalise(stacked[start : start + AT_ONCE])
            parts.append(adapter.log_probs(h, head, tokens))
        log_p = torch.cat(parts)
        steps = torch.tensor([len(row.tokens) + n for row, n in contexts])
        lengths = torch.tensor([row.prompt.source_length for row, _ in contexts])
        weights = self._schedule.weights(steps, lengths).float().broadcast_to(steps.shape)
        return list(torch.split(log_p, counts)), list(torch.split(weights, counts))

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
        ProposedTexts(plm, proposer, adapter, schedule, ends).write(rows, stop)
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
