"""Copying from the prompt: the part of an adapter that reads the tokens of the input."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, linear, logsigmoid, rms_norm

from pema.adapter.config import MATCHES, USES, WINDOW, AdapterConfig
from pema.memory.pairing import NO_TARGET
from pema.memory.prompts import BLANK, ContextTokens

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from pema.memory.reader import Memory
    from pema.tasks.spelling import Speller

RATE = 3.0
"""Learning rate of copying, relative to that of A and B_pd; that of its scalars is ten times as large."""

NO_TOKEN = BLANK
"""In place of a token where there is none."""

COUNTED = 20_000
"""Maximum number of pairs, evenly spaced, in which `copyable` counts."""

NEVER = -1e9
"""Score of what is no candidate: finite, so that a prompt without candidates has no NaN."""


class Keys(NamedTuple):
    """What the candidates of b prompts are compared with; it depends on the prompts only.

    Attributes:
        tokens: (b, 2 S) int64, the candidates: the tokens of the prompt, then their spellings; `BLANK` for none.
        places: (b, 2 S) int64, the row of each in `rows`; the last one for none.
        rows: (u + 1, d), the rows of W_hd of the distinct tokens, then zeros.
        ids: (u,) int64, these tokens, sorted.
        window: (len(WINDOW), u + 1, k), their shares in the keys.
        ends: (b, S) int64, the spelling that ends in front of each token; `BLANK` for none.
    """

    tokens: Tensor
    places: Tensor
    rows: Tensor
    ids: Tensor
    window: Tensor
    ends: Tensor

    def repeat(self, rows: int) -> Keys:
        """Return the keys of `rows` rows, of which equally many adjacent ones have the same prompt."""
        times = rows // len(self.tokens)
        each = (t.repeat_interleave(times, 0) for t in (self.tokens, self.places, self.ends))
        tokens, places, ends = each
        return self._replace(tokens=tokens, places=places, ends=ends)

    def take(self, rows: list[int] | slice) -> Keys:
        """Return the keys of some of the prompts."""
        return self._replace(tokens=self.tokens[rows], places=self.places[rows], ends=self.ends[rows])


class Copied(NamedTuple):
    """The copying part of P_PEMA = g P_copy + (1 - g) softmax(W_hd h_pd).

    Attributes:
        keys: the candidates.
        log_copy: (b, 2 S) float32, log(g P_copy) of each candidate; a token may occur several times.
        log_rest: (b,) float32, log(1 - g).
    """

    keys: Keys
    log_copy: Tensor
    log_rest: Tensor

    def log_p(self, targets: Tensor) -> Tensor:
        """Return log(g P_copy(y)) of targets (b,): (b,) float32, below `NEVER` / 2 if they are no candidates."""
        return self.log_copy.masked_fill(self.keys.tokens != targets[:, None], NEVER).logsumexp(-1)

    def mixed(self, log_vocabulary: Tensor, targets: Tensor) -> Tensor:
        """Return log P_PEMA(y) of targets (b,) from log softmax(W_hd h_pd)_y (b,)."""
        return torch.logaddexp(self.log_p(targets), self.log_rest + log_vocabulary)

    def by_token(self) -> Tensor:
        """Return log(g P_copy) of the tokens `keys.ids`: (b, u) float32; -inf for those of other rows."""
        sums = self.log_copy.new_zeros(len(self.log_rest), len(self.keys.rows))
        return sums.scatter_add_(1, self.keys.places, self.log_copy.exp())[:, :-1].log()

    def over(self, log_vocabulary: Tensor) -> Tensor:
        """Return log P_PEMA of every token from log softmax(W_hd h_pd): (b, V) -> (b, V) float32."""
        rest, ids = log_vocabulary + self.log_rest[:, None], self.keys.ids
        return rest.index_copy_(1, ids, torch.logaddexp(rest.index_select(1, ids), self.by_token()))


class Copying(nn.Module):
    """P_copy and the gate g, from f, the tokens of the prompt, and those written after it.

    A candidate is a token of the prompt, or the token that writes it after a space (`pema.tasks.spelling`). With
    q = query(norm(f), norm(W_hd[w])) for the last written token w, the score of the candidate c at place j is

        q . (sum_o K_o norm(W_hd[x_{j+o}]) / sqrt(k) + M[m] + U[u] + S[s]) + alpha[s] f . W_hd[c] / 4 + m_0[m] + u_0[u]

    where m is the number of last written tokens that precede j in the prompt, u how often c was written before, and s
    whether c is a spelling. P_copy is their softmax. logit(g) is linear in q, the largest m, the entropy of P_copy
    and the largest score.
    """

    def __init__(self, config: AdapterConfig, random: torch.Generator) -> None:
        super().__init__()
        d, k = config.d, config.copy_width
        self.query = nn.Parameter(_normal(k, 2 * d, random))
        self.query_bias = nn.Parameter(torch.zeros(k))
        self.mix = nn.Parameter(_normal(k, k, random))
        self.keys_of = nn.Parameter(_normal(len(WINDOW) * k, d, random).view(len(WINDOW), k, d) / len(WINDOW) ** 0.5)
        self.match = nn.Parameter(torch.zeros(MATCHES, k))
        self.use = nn.Parameter(torch.zeros(USES, k))
        self.kind = nn.Parameter(torch.zeros(2, k))
        self.gate = nn.Parameter(torch.zeros(k))
        self.alpha = nn.Parameter(torch.ones(2))
        self.match_score = nn.Parameter(torch.tensor([0.0, 1.0, 2.0, 3.0]))
        self.use_score = nn.Parameter(torch.tensor([0.0, -0.5, -1.0]))
        self.gate_match = nn.Parameter(torch.tensor([-3.0, -2.0, -1.5, -1.0]))
        self.gate_scores = nn.Parameter(torch.zeros(2))

    def groups(self) -> list[dict[str, Any]]:
        """Return the parameters in groups for the optimizer: the scalars of scores and gate need a higher rate."""
        scalars = [self.alpha, self.match_score, self.use_score, self.gate_match, self.gate_scores]
        others = [each for each in self.parameters() if all(each is not scalar for scalar in scalars)]
        return [{"params": others, "relative": RATE}, {"params": scalars, "relative": 10 * RATE}]

    def keys(self, tokens: ContextTokens, W_hd: Tensor, drop: Callable[[Tensor], Tensor] | None = None) -> Keys:
        """Return the keys of prompts; `drop` is applied to the rows of W_hd."""
        candidates = torch.cat((tokens.prompt, tokens.spellings), 1)
        ids = tokens.ids
        if ids is None:
            # Marks of the tokens that occur: faster than sorting. The last one is that of blanks.
            occurs = torch.zeros(len(W_hd) + 1, dtype=torch.bool, device=candidates.device)
            occurs[candidates.flatten()] = True
            ids = occurs[:-1].nonzero()[:, 0]
        numbers = torch.full((len(W_hd) + 1,), len(ids), device=ids.device)
        numbers[ids] = torch.arange(len(ids), device=ids.device)
        places = numbers[candidates]
        rows = W_hd[ids].to(self.query.dtype)
        rows = torch.cat((rows, rows.new_zeros(1, rows.shape[1])))
        x = rms_norm(rows, rows.shape[1:])
        window = torch.einsum("ud,okd->ouk", x if drop is None else drop(x), self.keys_of)
        return Keys(candidates, places, rows, ids, window, _ends(tokens))

    def forward(
        self, f: Tensor, keys: Keys, written: Tensor, W_hd: Tensor, drop: Callable[[Tensor], Tensor] | None = None
    ) -> Copied:
        """Return the copying part at b contexts.

        Args:
            f: (b, d) head input.
            keys: of the contexts' prompts.
            written: (b, W) int64, `BLANK`, then the tokens after the prompt, the last one in the last column.
            W_hd: (V, d).
            drop: dropout on the inputs of the query.
        """
        q = self._query(f.to(self.query.dtype), written, W_hd, drop)
        S = keys.tokens.shape[1] // 2
        match, use = _match(keys, written), _uses(keys, written)
        known = keys.tokens != BLANK
        by_token = torch.einsum("bk,ouk->obu", q, keys.window).float() / q.shape[1] ** 0.5
        score = torch.zeros(f.shape[0], S, device=f.device)
        for o, offset in enumerate(WINDOW):
            score = score + by_token[o].gather(1, shifted(keys.places[:, :S], offset, len(keys.rows) - 1))
        score = score + (linear(q, self.match).float() + self.match_score).gather(1, match)
        score = torch.cat((score, score), 1)
        score = score + (linear(q, self.use).float() + self.use_score).gather(1, use)
        plm = linear(f.to(keys.rows.dtype), keys.rows).float().gather(1, keys.places) / 4
        kind = linear(q, self.kind).float()[:, :, None] + self.alpha[:, None] * plm.view(-1, 2, S)
        score = (score + kind.reshape(-1, 2 * S)).masked_fill(~known, NEVER)
        log_p = score.log_softmax(-1)
        sure = (log_p.exp() * log_p).sum(-1)
        longest = match.masked_fill(~known[:, :S], 0).amax(1, keepdim=True)
        gate = (linear(q, self.gate[None]).float() + self.gate_match).gather(1, longest)[:, 0]
        gate = gate + self.gate_scores[0] * sure + self.gate_scores[1] * score.amax(1) / 10
        gate = gate.masked_fill(~known.any(1), NEVER)
        return Copied(keys, log_p + logsigmoid(gate)[:, None], logsigmoid(-gate))

    def _query(self, f: Tensor, written: Tensor, W_hd: Tensor, drop: Callable[[Tensor], Tensor] | None) -> Tensor:
        """Return q: (b, k)."""
        last = written[:, -1] if written.shape[1] else written.new_full((len(f),), BLANK)
        e = W_hd[last.clamp(min=0)].to(f.dtype).masked_fill((last == BLANK)[:, None], 0.0)
        x = torch.cat((rms_norm(f, f.shape[1:]), rms_norm(e, e.shape[1:])), 1)
        q: Tensor = linear(gelu(linear(x if drop is None else drop(x), self.query, self.query_bias)), self.mix)
        return q


def context_tokens(
    speller: Speller, prompts: Sequence[Sequence[int]], written: Sequence[Sequence[int]], frame: tuple[int, int]
) -> ContextTokens:
    """Return what copying reads at contexts: prompts without their `frame`, and the tokens written after them."""
    spelled = [speller(prompt) for prompt in prompts]
    inner = [slice(frame[0], max(len(prompt) - frame[1], frame[0])) for prompt in prompts]
    columns = max([1, *(len(prompt[cut]) for prompt, cut in zip(prompts, inner, strict=True))])
    rows = [(*zip(*spellings, strict=True),) or ((), ()) for spellings in spelled]

    def padded(values: Sequence[Sequence[int]], blank: int) -> Tensor:
        lists = [list(each[cut]) for each, cut in zip(values, inner, strict=True)]
        return torch.tensor([each + [blank] * (columns - len(each)) for each in lists])

    W = max((len(each) for each in written), default=0)
    text = torch.tensor([[BLANK] * (W - len(each)) + list(each) for each in written], dtype=torch.int64)
    spans = padded([row[1] for row in rows], 0)
    # A spelling that ends after the frame's start of the end writes tokens of the template.
    inside = torch.tensor([cut.stop - cut.start for cut in inner])[:, None]
    spans = spans.masked_fill(torch.arange(columns) + spans > inside, 0)
    spellings = padded([row[0] for row in rows], BLANK).masked_fill(spans == 0, BLANK)
    return ContextTokens(padded(prompts, BLANK), spellings, spans, text.view(len(written), W))


def copyable(memory: Memory) -> float:
    """Return the share of the memory's target tokens that occur in their prompts, or write a word of these."""
    targets = torch.from_numpy(np.concatenate([shard.targets(0, shard.entry.pairs) for shard in memory.shards]))
    paired = (targets != NO_TARGET).nonzero()[:, 0]
    rows = paired[:: 1 + len(paired) // COUNTED]
    occur = 0
    for part in torch.split(rows, 1024):
        tokens = memory.prompts.at(part, memory.prompts.frame)
        occur += int((torch.cat((tokens.prompt, tokens.spellings), 1) == targets[part, None]).any(1).sum())
    return occur / len(rows)


def _normal(rows: int, columns: int, random: torch.Generator) -> Tensor:
    return nn.init.normal_(torch.empty(rows, columns), std=columns**-0.5, generator=random)


def shifted(x: Tensor, offset: int, blank: int) -> Tensor:
    """Return y with y[:, j] = x[:, j + offset], and `blank` outside x."""
    y = torch.full_like(x, blank)
    n = x.shape[1]
    if abs(offset) < n:
        y[:, max(0, -offset) : n - max(0, offset)] = x[:, max(0, offset) : n - max(0, -offset)]
    return y


def _ends(tokens: ContextTokens) -> Tensor:
    """Return (b, S), the spelling whose span ends in front of each token of the prompt."""
    S = tokens.prompt.shape[1]
    stops = torch.arange(S, device=tokens.spans.device) + tokens.spans
    stops = stops.masked_fill((tokens.spans == 0) | (stops >= S), S)
    ends: Tensor = tokens.spellings.new_full((len(stops), S + 1), BLANK)
    return ends.scatter(1, stops, tokens.spellings)[:, :S]


def _match(keys: Keys, written: Tensor) -> Tensor:
    """Return (b, S): how many of the last written tokens precede each token of the prompt, at most `MATCHES` - 1.

    The first of them may be a spelling.
    """
    S = keys.ends.shape[1]
    prompt = keys.tokens[:, :S]
    so_far = torch.ones_like(prompt, dtype=torch.bool)
    match = torch.zeros_like(prompt)
    for n in range(1, min(MATCHES, written.shape[1] + 1)):
        w = written[:, -n, None]
        before = (shifted(prompt, -n, BLANK) == w) & (w != BLANK)
        spelled = (shifted(keys.ends, 1 - n, BLANK) == w) & (w != BLANK)
        match = match + (so_far & (before | spelled) & (prompt != BLANK))
        so_far = so_far & before
    return match


def _uses(keys: Keys, written: Tensor) -> Tensor:
    """Return (b, 2 S): how often each candidate was written before, at most `USES` - 1."""
    u = len(keys.ids)
    if not u or not written.shape[1]:
        return torch.zeros_like(keys.tokens)
    places = torch.searchsorted(keys.ids, written).clamp(max=u - 1)
    places = places.masked_fill(keys.ids[places] != written, u)
    counts = torch.zeros(len(written), u + 1, dtype=torch.int64, device=written.device)
    counts.scatter_add_(1, places, torch.ones_like(places))
    counts[:, u] = 0
    S = keys.ends.shape[1]
    used = counts.gather(1, keys.places)
    # A token that was written in one of its two spellings was used.
    both = used[:, :S] + used[:, S:]
    return torch.cat((both, both), 1).clamp(max=USES - 1)
