"""From a group of examples to the content of its shard: the PLM is asked, its answers are paired and converted."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from pema.errors import OwnerError, StorageError
from pema.memory.groups import Group
from pema.memory.journal import Journal
from pema.memory.manifest import Manifest
from pema.memory.pairing import NO_TARGET, agreeing, pair
from pema.memory.precision import StorageLoss
from pema.memory.shard import Contents, StoredPrompts, channel_scales_of, restore, store
from pema.owner.contract import PLM, ContextRepresentations, PLMDescription, suited_tokens
from pema.tasks.spelling import speller_of


class Encoder:
    """The PLM of a build, and what is stored of its answers.

    Attributes:
        asked: the manifest with what is asked for the last input; its shards are not used.
    """

    def __init__(self, plm: PLM, manifest: Manifest, batch_tokens: int | None) -> None:
        """Prepare to ask.

        Args:
            plm: the PLM.
            manifest: the memory's manifest.
            batch_tokens: maximum tokens of a batch; None: suited to the PLM's device.
        """
        self.asked = manifest.asked
        self._plm, self._batch_tokens = plm, batch_tokens or suited_tokens(plm)
        self._dtype, self._on_policy = manifest.dtype, self.asked is not manifest
        self._loss, self._speller = StorageLoss(plm.head(), manifest.dtype), speller_of(plm.tokenizer)

    def answers(self, group: Group, journal: Journal | None = None) -> Iterator[ContextRepresentations]:
        """Yield the answers for a group that are missing from the journal, and write them into it, however this ends.

        Raises:
            OwnerError: an answer was not requested, or already given.
            StorageError: the journal cannot be written.
        """
        answered = set(() if journal is None else journal.answers)
        if len(answered) == len(group):
            return
        try:
            for answer in self._ask(group, frozenset(answered)):
                if not 0 <= answer.index < len(group) or answer.index in answered:
                    raise OwnerError(
                        f"{self.asked.plm.name} answered for sequence {answer.index} of {len(group)}, "
                        "which was not requested or was already answered."
                    )
                answered.add(answer.index)
                if journal is not None:
                    journal.add(answer)
                yield answer
        except BaseException:
            if journal is not None:
                with contextlib.suppress(StorageError):
                    journal.flush()
            raise

    def _ask(self, group: Group, skip: frozenset[int]) -> Iterator[ContextRepresentations]:
        tokens, count = group.tokens, range(len(group))
        if self.asked.contexts == "teacher":
            cuts = (tokens.cuts - tokens.starts[:-1]).tolist()
            sequences = [tokens.sequence(i) for i in count]
            return self._plm.represent(sequences, cuts, batch_tokens=self._batch_tokens, skip=skip)
        prompts = [tokens.prompt(i) for i in count]
        return self._plm.predict(prompts, group.contexts.tolist(), batch_tokens=self._batch_tokens, skip=skip)

    def contents(
        self, group: Group, answers: Sequence[ContextRepresentations | None], channel_scales: Tensor | None
    ) -> Contents:
        """Pair the answers for one group with their targets, and convert them to the storage type.

        Args:
            group: the group.
            answers: one for each of its examples, in order.
            channel_scales: for int8 those of the memory's first shard, so that all shards have the same; None for the
                first shard itself.

        Raises:
            OwnerError: an answer is missing, or does not match the request.
            DataError: a representation contains NaN or infinity; the message names the example.
            ConfigError: a value is too large for the storage type, or it raises the PLM's perplexity too much.
        """
        plm, asked, tokens = self.asked.plm, self.asked, group.tokens
        teacher = asked.contexts == "teacher"
        golds, rows, texts, agree = [], [], [], 0
        for i, answer in enumerate(answers):
            if answer is None:
                raise OwnerError(f"{plm.name} did not answer for {group.names[i]}.")
            generated = None if teacher else _generated(answer, plm)
            gold = pair(tokens.target(i), generated, asked.targets)
            if generated is not None:
                agree += agreeing(tokens.target(i), generated[: len(gold)])
            f = answer.representations
            # A teacher context exists for every target token, a predicted one only until the PLM ends the text.
            fits = len(f) == len(gold) if teacher else len(f) >= len(gold) > 0
            if f.ndim != 2 or f.shape[1] != plm.d_tap or not fits:
                raise OwnerError(
                    f"{plm.name} answered for {group.names[i]} with representations of shape {tuple(f.shape)}, "
                    f"expected ({len(gold)}, {plm.d_tap})."
                )
            golds.append(gold)
            if generated is not None:
                texts += generated[: len(gold)]
            rows.append(f[: len(gold)])
        offsets = np.concatenate([[0], np.cumsum([len(gold) for gold in golds])])

        def where(row: int) -> str:
            return group.names[int(np.searchsorted(offsets, row, side="right")) - 1]

        f = torch.cat(rows)
        if self._dtype == "int8" and channel_scales is None:
            channel_scales = channel_scales_of(f)
        stored, scales = store(f, self._dtype, where, channel_scales)
        targets = torch.from_numpy(np.concatenate(golds))
        measured = self._loss.sample((targets != NO_TARGET).nonzero()[:, 0])
        read = restore(stored[measured], None if scales is None else scales[measured], channel_scales)
        self._loss.add(f[measured], read, targets[measured])
        return Contents(
            representations=stored,
            scales=scales,
            channel_scales=channel_scales,
            targets=targets.to(torch.int32),
            example_offsets=torch.from_numpy(offsets),
            source_lengths=torch.from_numpy(tokens.source_lengths).to(torch.int32),
            agreeing=None if teacher else agree,
            on_policy=self._on_policy,
            sources=None if tokens.sources is None else torch.from_numpy(tokens.sources),
            prompts=self._prompts(group, None if teacher else texts),
        )

    def _prompts(self, group: Group, texts: Sequence[int] | None) -> StoredPrompts:
        """Return the tokens of the prompts of a group, whose `predicted` contexts end with `texts`."""
        prompts = [group.tokens.prompt(i) for i in range(len(group))]
        spelled = [spelling for prompt in prompts for spelling in self._speller(prompt)]
        return StoredPrompts(
            tokens=np.concatenate([np.array(prompt, np.int32) for prompt in prompts]),
            spellings=np.array([spelling.token for spelling in spelled], np.int32),
            spans=np.array([spelling.span for spelling in spelled], np.uint8),
            offsets=np.cumsum([0, *map(len, prompts)]).astype(np.int64),
            written=None if texts is None else np.array(texts, np.int32),
        )


def _generated(answer: ContextRepresentations, plm: PLMDescription) -> list[int]:
    generated: Tensor | None = answer.generated
    if generated is None or len(generated) != len(answer.representations):
        raise OwnerError(f"{plm.name} did not return one generated token per predicted context.")
    return [int(token) for token in generated.tolist()]
