"""A causal LM of transformers on top of a decoding session, so that `generate` works across the boundary."""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Cache, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from pema.errors import OwnerError
from pema.owner.causal_lm import OUTPUT_NAME

if TYPE_CHECKING:
    from pema.owner.contract import PLM, Session


class SessionConfig(PreTrainedConfig):  # type: ignore[misc]
    """The model configuration that `generate` needs."""

    model_type = "pema-session"


class SessionCache(Cache):  # type: ignore[misc]
    """The substitute for a key-value cache: the session row that each batch row continues.

    Attributes:
        session: the decoding session; None once every row has ended.
        length: number of positions of the rows, including padding.
        rows: session row of each batch row; -1 for a row that has ended.
        remaining: number of further tokens that fit into each row.
    """

    def __init__(self, session: Session, length: int, rows: list[int], remaining: list[int]) -> None:
        super().__init__(layers=[])
        self.session: Session | None = session
        self.length = length
        self.rows = rows
        self.remaining = remaining

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return the number of positions of the rows."""
        return self.length

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Continue row beam_idx[i] as row i."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows `indices`, in this order."""
        self.rows = [self.rows[i] for i in indices.tolist()]
        self.remaining = [self.remaining[i] for i in indices.tolist()]

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row `repeats` times, consecutively."""
        self.batch_select_indices(torch.arange(len(self.rows)).repeat_interleave(repeats))

    def crop(self, tokens_to_remove: int) -> None:
        """Refuse to crop: a session cannot go back.

        Raises:
            OwnerError: always.
        """
        raise OwnerError(
            "A decoding session cannot go back, so assisted and contrastive decoding need a PLM in this process: "
            "use greedy decoding, sampling or beam search."
        )

    @property
    def is_compileable(self) -> bool:
        """False: the session runs outside the compiled graph."""
        return False

    def close(self) -> None:
        """Close the session."""
        if self.session is not None:
            self.session.close()
            self.session = None


@dataclass(frozen=True, slots=True)
class _Call:
    """One call of `generate`, stored in a context variable so that concurrent calls are independent.

    Attributes:
        ends: tokens that end a sequence.
        opened: caches of the sessions opened by the call.
    """

    ends: frozenset[int]
    opened: list[SessionCache] = field(default_factory=list)


_CALL: ContextVar[_Call | None] = ContextVar("pema_session_call", default=None)


class SessionModel(PreTrainedModel, GenerationMixin):  # type: ignore[misc]
    """A model with logits = head(f), where f comes from a decoding session of a local or remote PLM.

    Its output head is W_hd of the head bundle, so an adapter is plugged in as into the PLM itself. A row leaves the
    session after its end-of-sequence token, and is forced to end when it fills the context window.

    Attributes:
        lm_head: W_hd and its bias; shares the memory of the head bundle.
    """

    config_class = SessionConfig
    main_input_name = "input_ids"

    def __init__(self, plm: PLM) -> None:
        description, tokenizer, head = plm.description, plm.tokenizer, plm.head()
        ends = list(description.eos_token_ids)
        super().__init__(
            SessionConfig(
                vocab_size=description.vocabulary_size,
                hidden_size=description.d,
                max_position_embeddings=description.max_length,
                num_hidden_layers=0,
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=ends or None,
                pad_token_id=ends[0] if tokenizer.pad_token_id is None and ends else tokenizer.pad_token_id,
            )
        )
        self._plm, self._head = plm, head
        self.lm_head = nn.Linear(head.d, head.vocabulary_size, bias=head.bias is not None, device="meta")
        self.lm_head.weight = nn.Parameter(head.weight, requires_grad=False)
        if head.bias is not None:
            self.lm_head.bias = nn.Parameter(head.bias, requires_grad=False)
        self.eval()

    def get_output_embeddings(self) -> nn.Module:
        """Return W_hd."""
        return self.lm_head

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False

    def generate(self, inputs: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        """Generate as every model of transformers; the sessions that it opens are closed when it returns."""
        config = kwargs.get("generation_config") or (args[0] if args else None) or self.generation_config
        ends = kwargs.get("eos_token_id", config.eos_token_id)
        call = _Call(frozenset([] if ends is None else [ends] if isinstance(ends, int) else ends))
        before = _CALL.get()
        _CALL.set(call)
        try:
            return super().generate(inputs, *args, **kwargs)
        finally:
            for cache in call.opened:
                cache.close()
            _CALL.set(before)

    @torch.no_grad()
    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        cache: SessionCache | None = None,
        use_cache: bool | None = None,
        past_key_values: SessionCache | None = None,
        **_settings: object,
    ) -> CausalLMOutputWithPast:
        """Compute the logits of the last position only, (rows, 1, V) float32, for prompts or chosen tokens.

        Args:
            input_ids: (rows, columns) prompts padded on the left, or (rows, 1) chosen tokens.
            attention_mask: (rows, columns) 0 at padding.
            cache: the cache returned by the previous call.
            use_cache: whether the session stays open.
            past_key_values: name of `cache` in older versions of transformers.

        Raises:
            OwnerError: more than one token per row after the prompt.
        """
        cache = past_key_values if cache is None else cache
        if cache is None:
            cache, f = self._begin(input_ids, attention_mask)
        else:
            f = self._advance(cache, input_ids)
        h = self._head.normalise(f.to(self.lm_head.weight.device)).to(self.lm_head.weight.dtype)
        logits = self._head.bound(self.lm_head(h[:, None]))
        ended = torch.tensor([row < 0 for row in cache.rows], device=logits.device)
        if bool(ended.any()) and self._plm.description.eos_token_ids:
            logits[ended] = -torch.inf
            logits[ended, :, self._plm.description.eos_token_ids[0]] = 0.0
        if use_cache is False:
            cache.close()
        return CausalLMOutputWithPast(logits=logits, **{OUTPUT_NAME: None if use_cache is False else cache})

    def _begin(self, input_ids: Tensor, mask: Tensor | None) -> tuple[SessionCache, Tensor]:
        attended = torch.ones_like(input_ids) if mask is None else mask[:, -input_ids.shape[1] :]
        prompts = [tuple(row[keep.bool()].tolist()) for row, keep in zip(input_ids, attended, strict=True)]
        # The beams of one input start from the same prompt, which is sent once.
        places = {prompt: i for i, prompt in enumerate(dict.fromkeys(prompts))}
        session = self._plm.open_session(list(places))
        rows = [places[prompt] for prompt in prompts]
        remaining = [self._plm.description.max_length - len(prompt) for prompt in prompts]
        cache = SessionCache(session, input_ids.shape[1], rows, remaining)
        if (call := _CALL.get()) is not None:
            call.opened.append(cache)
        return cache, session.representations[rows]

    def _advance(self, cache: SessionCache, input_ids: Tensor) -> Tensor:
        if input_ids.shape[1] != 1:
            raise OwnerError(
                f"A decoding session takes one token per step, not {input_ids.shape[1]}: use greedy decoding, sampling "
                "or beam search."
            )
        tokens = input_ids[:, 0].tolist()
        call = _CALL.get()
        ends = frozenset() if call is None else call.ends
        steps = [
            (row, token) if row >= 0 and remaining > 1 and token not in ends else None
            for row, token, remaining in zip(cache.rows, tokens, cache.remaining, strict=True)
        ]
        places = {step: i for i, step in enumerate(dict.fromkeys(step for step in steps if step is not None))}
        cache.length += 1
        cache.remaining = [remaining - 1 for remaining in cache.remaining]
        cache.rows = [-1 if step is None else places[step] for step in steps]
        if not places or cache.session is None:
            cache.close()
            return torch.zeros(len(steps), self._plm.description.d_tap)
        cache.session.advance([token for _, token in places], [row for row, _ in places])
        representations = cache.session.representations
        return representations.index_select(0, torch.tensor(cache.rows).clamp_min(0))


# Pipelines check that the class is registered as a text generator.
AutoModelForCausalLM.register(SessionConfig, SessionModel)
