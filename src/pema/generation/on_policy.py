"""Contexts that an adapter reaches: `predicted` contexts whose text the adapter writes, not the PLM.

A build from `OnPolicy` in place of the PLM stores them. With aligned targets they teach an adapter how to go on from
its own texts (the dynamic oracle of imitation learning). The PLM's owner sees the prompts and what the adapter writes,
in decoding sessions, as in generation.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, NoReturn

import torch
from torch import Tensor

from pema.adapter.copying import Keys
from pema.errors import ConfigError
from pema.generation.reading import Reader
from pema.owner.batching import length_batches
from pema.owner.bundle import digest_tensors
from pema.owner.contract import BATCH_TOKENS, ContextRepresentations
from pema.owner.requests import require_prompts
from pema.tasks.spelling import speller_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from pema.adapter.module import Adapter
    from pema.owner.contract import PLM, PLMDescription, Session
    from pema.owner.head import Head

ROWS = 64
"""Maximum number of rows of a session; servers limit them."""


class OnPolicy:
    """A PLM (`contract.PLM`) whose `predicted` contexts follow what an adapter writes: greedily, with weight 1."""

    def __init__(self, plm: PLM, adapter: Adapter) -> None:
        """Check that the adapter belongs to the PLM.

        Raises:
            MismatchError: it was trained for another PLM.
        """
        adapter.require(plm.description)
        self._plm, self._adapter = plm, adapter.eval()

    @cached_property
    def policy(self) -> str:
        """Digest of the adapter's weights."""
        return digest_tensors(self._adapter.state_dict(), {})

    @property
    def description(self) -> PLMDescription:
        """Description of the PLM."""
        return self._plm.description

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The PLM's tokenizer."""
        return self._plm.tokenizer

    @property
    def model(self) -> PreTrainedModel:
        """The PLM's model, without the adapter."""
        return self._plm.model

    @property
    def generator(self) -> PreTrainedModel:
        """The PLM's generator, without the adapter."""
        return self._plm.generator

    def head(self) -> Head:
        """Return the head bundle."""
        return self._plm.head()

    def represent(
        self,
        sequences: Sequence[Sequence[int]],
        starts: Sequence[int],
        *,
        batch_tokens: int = BATCH_TOKENS,
        skip: frozenset[int] = frozenset(),
    ) -> NoReturn:
        """Refuse `teacher` contexts, which do not depend on an adapter.

        Raises:
            ConfigError: always.
        """
        raise ConfigError("contexts='teacher' with an adapter: build with contexts='predicted' where it writes them.")

    def open_session(self, prompts: Sequence[Sequence[int]]) -> Session:
        """Open a decoding session of the PLM."""
        return self._plm.open_session(prompts)

    def predict(
        self,
        prompts: Sequence[Sequence[int]],
        steps: Sequence[int],
        *,
        batch_tokens: int = BATCH_TOKENS,
        skip: frozenset[int] = frozenset(),
    ) -> Iterator[ContextRepresentations]:
        """Represent the contexts that greedy decoding reaches; equal prompts are decoded once.

        See `contract.PLM.predict`.
        """
        require_prompts(prompts, steps, self.description.max_length)
        equal: dict[tuple[int, ...], list[int]] = {}
        for i, prompt in enumerate(prompts):
            equal.setdefault(tuple(prompt), []).append(i)
        same = list(equal.values())
        limits = [max(steps[i] for i in numbers) for numbers in same]
        lengths = [len(prompts[numbers[0]]) + limit for numbers, limit in zip(same, limits, strict=True)]
        for wide in length_batches(lengths, batch_tokens):
            for batch in (wide[k : k + ROWS] for k in range(0, len(wide), ROWS)):
                if all(skip.issuperset(same[j]) for j in batch):
                    continue
                texts = self._decode([prompts[same[j][0]] for j in batch], [limits[j] for j in batch])
                for j, (f, written) in zip(batch, texts, strict=True):
                    for i in same[j]:
                        if i not in skip:
                            yield ContextRepresentations(i, f[: steps[i]].clone(), written[: steps[i]].clone())

    @torch.no_grad()
    def _decode(self, prompts: Sequence[Sequence[int]], limits: Sequence[int]) -> list[tuple[Tensor, Tensor]]:
        """Return (n, d_tap) representations and the (n,) tokens that the adapter chooses after each, per prompt."""
        ends = self.description.eos_token_ids
        W_hd = self.head().weight
        adapter, keys = self._adapter.to(W_hd.device), None
        if adapter.copying is not None:
            keys = Reader(adapter, speller_of(self.tokenizer), W_hd).keys_of(prompts)
        active, written = list(range(len(prompts))), torch.empty(len(prompts), 0, dtype=torch.int64)
        f: list[list[Tensor]] = [[] for _ in prompts]
        texts: list[list[int]] = [[] for _ in prompts]
        session = self._plm.open_session(prompts)
        try:
            while active:
                chosen = self._choose(session.representations, keys, written)
                for i, row, token in zip(active, session.representations, chosen.tolist(), strict=True):
                    f[i].append(row.clone())
                    texts[i].append(token)
                rows = [k for k, i in enumerate(active) if texts[i][-1] not in ends and len(texts[i]) < limits[i]]
                if rows:
                    session.advance(chosen[rows].tolist(), rows)
                active, written = [active[k] for k in rows], torch.cat((written, chosen[:, None]), 1)[rows]
                keys = None if keys is None else keys.take(rows)
        finally:
            session.close()
        return [(torch.stack(rows), torch.tensor(text)) for rows, text in zip(f, texts, strict=True)]

    def _choose(self, f: Tensor, keys: Keys | None, written: Tensor) -> Tensor:
        """Return the most probable token of P_PEMA at contexts: f (rows, d_tap), written (rows, W) -> (rows,)."""
        head, adapter, copied = self.head(), self._adapter, None
        h = head.normalise(f.to(head.weight.device)).float()
        if adapter.copying is not None and keys is not None:
            copied = adapter.copying(h, keys, written.to(h.device), head.weight)
        return adapter.log_probs_with(h, head, copied).argmax(-1).cpu()
