"""The PLM with a small LM that was fine-tuned on the task."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Cache
from transformers.modeling_outputs import CausalLMOutputWithPast

from pema.evaluation.perplexity import LOGITS_BYTES
from pema.generation.batches import plain
from pema.generation.classification import Classification, choose_labels
from pema.generation.decoding import GeneratedTexts, decode
from pema.methods.contract import AdaptedModel, Job
from pema.methods.on_memory import head_on_device, memory_of
from pema.methods.small_models import combine
from pema.methods.targets import perplexity_of
from pema.owner.causal_lm import OUTPUT_NAME, state_of
from pema.owner.contract import PLM
from pema.owner.local import LocalPLM
from pema.owner.session_model import SessionModel
from pema.tasks.example import Example


class CombinedCache(Cache):  # type: ignore[misc]
    """The states of several models on the same rows.

    Attributes:
        parts: the state of each model.
    """

    def __init__(self, parts: Sequence[Cache]) -> None:
        super().__init__(layers=[])
        self.parts = parts

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return the number of positions of the rows."""
        length: int = self.parts[0].get_seq_length(layer_idx)
        return length

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Continue row beam_idx[i] as row i."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows `indices`, in this order."""
        for part in self.parts:
            part.batch_select_indices(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row `repeats` times, consecutively."""
        for part in self.parts:
            part.batch_repeat_interleave(repeats)

    def crop(self, tokens_to_remove: int) -> None:
        """Refuse to crop, as sessions do."""
        self.parts[0].crop(tokens_to_remove)

    @property
    def is_compileable(self) -> bool:
        """False: sessions run outside the compiled graph."""
        return False


class CombinedModel(SessionModel):
    """A causal LM whose logits are those of the PLM and of small LMs, combined; each decodes in a session of its own.

    Sessions give every row what its model computes for that row alone, with a cache, whatever the architecture.
    """

    def __init__(self, plm: PLM, others: Sequence[LocalPLM], weight: float) -> None:
        super().__init__(plm)
        # A tuple is not registered among the modules: the small LMs are no weights of this model.
        self._others, self._weight = tuple(map(SessionModel, others)), weight

    @torch.no_grad()
    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        cache: Any = None,  # noqa: ANN401
        use_cache: bool | None = None,
        past_key_values: Any = None,  # noqa: ANN401
        **_settings: object,
    ) -> CausalLMOutputWithPast:
        """See `SessionModel.forward`."""
        cache = past_key_values if cache is None else cache
        states = [None] * (1 + len(self._others)) if cache is None else cache.parts
        models: list[Callable[..., CausalLMOutputWithPast]] = [super().forward, *self._others]
        outputs = [
            model(input_ids, attention_mask, cache=state, use_cache=use_cache)
            for model, state in zip(models, states, strict=True)
        ]
        plm, *others = (output.logits[:, -1] for output in outputs)
        logits = combine(plm, others, self._weight)[:, None]
        parts = None if use_cache is False else CombinedCache([state_of(output) for output in outputs])
        return CausalLMOutputWithPast(logits=logits, **{OUTPUT_NAME: parts})


class WithSmallLM(AdaptedModel):
    """The PLM with a tuned small LM, or with the difference between a tuned and the untuned one."""

    def __init__(self, plm: PLM, job: Job, others: Sequence[LocalPLM], weight: float, kept: Path) -> None:
        self._plm, self._job, self._others, self._weight, self._kept = plm, job, others, weight, kept
        self._model = CombinedModel(plm, others, weight)
        self._window = min(each.description.max_length for each in (plm, *others))

    @property
    def disk_bytes(self) -> int:
        """Bytes of the tuned small LM, and of the untuned one if it takes part."""
        weights = [p for other in self._others[1:] for p in other.model.parameters()]
        untuned: int = sum(p.numel() * p.element_size() for p in weights)
        return self._kept.stat().st_size + untuned

    def generate(self, sources: Sequence[str | Example], **settings: Any) -> GeneratedTexts:  # noqa: ANN401
        """See `AdaptedModel.generate`."""
        settings = {**self._job.decoding, **settings}
        return decode(self._plm, self._model, sources, self._job.task, plain, **settings, max_length=self._window)

    def classify(
        self,
        sources: Sequence[str | Example],
        labels: Sequence[str],
        **settings: Any,  # noqa: ANN401
    ) -> Classification:
        """See `AdaptedModel.classify`."""
        plm, task = self._plm, self._job.task
        return choose_labels(plm, self._model, sources, labels, task, **settings, max_length=self._window)

    @torch.no_grad()
    def perplexity(self, examples: Sequence[Example]) -> float:
        """See `AdaptedModel.perplexity`."""
        models = (self._plm, *self._others)
        memories = [memory_of(model, self._job.task, examples) for model in models]
        heads = [head_on_device(model, memory) for model, memory in zip(models, memories, strict=True)]
        size = max(16, LOGITS_BYTES // (4 * max(head.vocabulary_size for head in heads)))
        total, count = 0.0, 0
        for batches in zip(*(memory.view().batches(size) for memory in memories), strict=True):
            plm, *others = (
                head.logits(batch.representations.to(head.weight.device))
                for head, batch in zip(heads, batches, strict=True)
            )
            targets = batches[0].targets.to(plm.device)[:, None]
            log_p = combine(plm, others, self._weight).log_softmax(-1).gather(1, targets)
            total, count = total - float(log_p.double().sum()), count + len(targets)
        return perplexity_of(total / count)
