"""A transformers causal LM in this process, behind the owner's contract."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, TypedDict, Unpack

import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel, PreTrainedTokenizerBase
from transformers.modeling_outputs import CausalLMOutputWithPast

from pema.errors import DataError
from pema.owner import loading
from pema.owner.batching import common_prefix, length_batches, pad_left, pad_right
from pema.owner.contract import PLM, PLMDescription, Represented, Tap
from pema.owner.derivation import derive_head, evaluating, find_final_norm, hooked, output_embedding
from pema.owner.head import Head
from pema.owner.loading import DeviceMap
from pema.owner.mask import Mask, MaskedPLM
from pema.owner.prefix import Prefix
from pema.owner.weights import device_of, fingerprint

logger = logging.getLogger(__name__)

_DROP = 8
"""Finished rows leave the batch when they are at least one in this many: then the smaller batch pays for the copy."""

_LEAST_SHARED = 4
"""Tokens below which a shared prefix does not pay for its own forward pass."""


class Loading(TypedDict, total=False):
    """The settings of `LocalPLM.load`."""

    tap: Tap
    dtype: str | torch.dtype | None
    device_map: DeviceMap
    revision: str | None


def open_plm(name: str | Path, *, mask_secret: Path | None = None, **settings: Unpack[Loading]) -> PLM:
    """The PLM of that name: "embedded", a local folder or a hub name.

    Args:
        name: which PLM.
        mask_secret: file with the secret of its masked head (see `pema.owner.mask`); None for the plain one.
        settings: those of `LocalPLM.load`.

    Raises:
        OwnerError: it cannot be loaded, its head is not understood, or the secret cannot be read.
        ConfigError: a tap that cannot be masked.
    """
    if mask_secret is None:
        return LocalPLM.load(name, **settings)
    mask = Mask.read(mask_secret)
    return MaskedPLM(LocalPLM.load(name, **settings), mask)


class LocalPLM:
    """A frozen causal language model in this process.

    f(c) is read from the model's own forward pass by a hook at the tap, so every architecture works unmodified. Which
    short cuts hold for an architecture (padding, key-value cache, a shared prefix) is tried on its first use, against
    the plain forward pass; what does not hold is not used, and the log says so.

    Attributes:
        model: the transformers model, in evaluation mode.
        tokenizer: its tokenizer.
        tap: where representations are read.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        tap: Tap = "head_input",
        name: str | None = None,
    ) -> None:
        self.model = model.eval()
        self._tokenizer = tokenizer
        self.tap: Tap = tap
        self._name = name or loading.name_of(model)
        self._head = derive_head(model, tap)
        self._takes_positions = "position_ids" in inspect.signature(model.forward).parameters

    @classmethod
    def load(
        cls,
        name: str | Path,
        *,
        tap: Tap = "head_input",
        dtype: str | torch.dtype | None = None,
        device_map: DeviceMap = None,
        revision: str | None = None,
    ) -> LocalPLM:
        """Load a PLM as transformers does.

        Args:
            name: a hub name, a local folder, or "embedded".
            tap: where representations are read.
            dtype: a type, its name, or "auto" (the checkpoint's); None is "auto", but float32 on a processor without
                fast half precision.
            device_map: as in transformers; None is the CPU.
            revision: branch, tag or commit on the hub.

        Raises:
            OwnerError: it cannot be loaded, or its head is not understood.
        """
        model, tokenizer, called = loading.load(name, dtype=dtype, device_map=device_map, revision=revision)
        return cls(model, tokenizer, tap=tap, name=called)

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The PLM's tokenizer."""
        return self._tokenizer

    def head(self) -> Head:
        """The head bundle; it shares the model's memory."""
        return self._head

    @cached_property
    def description(self) -> PLMDescription:
        """What the PLM says of itself; the weights are hashed on first use."""
        return PLMDescription(
            name=self._name,
            architecture=type(self.model).__name__,
            fingerprint=fingerprint(self.model),
            tokenizer_fingerprint=loading.tokenizer_fingerprint(self._tokenizer),
            head_fingerprint=self._head.fingerprint,
            d=self._head.d,
            d_tap=self._head.d_tap,
            vocabulary_size=self._head.vocabulary_size,
            tap=self.tap,
            max_length=self.max_length,
            eos_token_ids=self._eos,
            parameters=sum(p.numel() for p in self.model.parameters()),
        )

    @cached_property
    def max_length(self) -> int:
        """Tokens that a context may have."""
        return loading.max_length(self.model, self._tokenizer)

    @cached_property
    def _eos(self) -> tuple[int, ...]:
        return loading.eos_token_ids(self.model, self._tokenizer)

    def represent(
        self, sequences: Sequence[Sequence[int]], starts: Sequence[int], *, batch_tokens: int = 8192
    ) -> Iterator[Represented]:
        """`teacher` contexts; see `contract.PLM.represent`."""
        for i, (sequence, start) in enumerate(zip(sequences, starts, strict=True)):
            if len(sequence) > self.max_length:
                raise DataError(
                    f"sequence {i} has {len(sequence)} tokens, the PLM's context window holds {self.max_length}: "
                    "shorten or leave out that example."
                )
            if not 1 <= start < len(sequence):
                raise DataError(
                    f"sequence {i} has {len(sequence)} tokens and its target starts at {start}: "
                    "there must be a token in front of the target and one in it."
                )
        return self._represent(sequences, starts, batch_tokens)

    def predict(
        self, prompts: Sequence[Sequence[int]], steps: Sequence[int], *, batch_tokens: int = 8192
    ) -> Iterator[Represented]:
        """`predicted` contexts; see `contract.PLM.predict`."""
        for i, (prompt, count) in enumerate(zip(prompts, steps, strict=True)):
            if len(prompt) == 0:
                raise DataError(f"prompt {i} is empty: a context needs at least one token.")
            if count < 1:
                raise DataError(f"prompt {i} is given {count} steps: ask for at least one.")
            if len(prompt) + count > self.max_length:
                raise DataError(
                    f"prompt {i} has {len(prompt)} tokens and {count} steps, the PLM's context window holds "
                    f"{self.max_length}: shorten the prompt or ask for fewer steps."
                )
        return self._predict(prompts, steps, batch_tokens)

    def _represent(
        self, sequences: Sequence[Sequence[int]], starts: Sequence[int], batch_tokens: int
    ) -> Iterator[Represented]:
        if not sequences:
            return
        shared = common_prefix(sequences, min(starts) - 1) if self._teacher_prefix_holds else 0
        prefix = self._prefix(sequences[0][:shared]) if pays(shared, sequences) else None
        skip = 0 if prefix is None else prefix.length
        lengths = [len(sequence) - skip for sequence in sequences]
        for batch in length_batches(lengths, batch_tokens if self._padding_holds else 0):
            rows = [sequences[i][skip:] for i in batch]
            counts = [len(sequences[i]) - starts[i] for i in batch]
            found = self._run_teacher(rows, [starts[i] - skip for i in batch], prefix)
            yield from map(Represented, batch, torch.split(found, counts))

    @torch.inference_mode()
    def _run_teacher(self, rows: Sequence[Sequence[int]], starts: Sequence[int], prefix: Prefix | None) -> Tensor:
        """One forward pass: (sum of len(row) - start, d_tap) representations, on the CPU.

        A causal model never looks at the padding on its right, so no mask is given and the fast attention is taken.
        """
        tokens = pad_right(rows)
        width = tokens.shape[1]
        wanted = torch.cat(
            [
                torch.arange(start - 1, len(row) - 1) + i * width
                for i, (row, start) in enumerate(zip(rows, starts, strict=True))
            ]
        )
        arguments: dict[str, Any] = {"use_cache": False}
        if prefix is not None:
            arguments = {"use_cache": True, "past_key_values": prefix.expanded(len(rows))}
        found, _ = self._forward(
            tokens, lambda x: x.flatten(0, -2).index_select(0, wanted.to(x.device)), last=False, **arguments
        )
        return found.cpu()

    def _predict(
        self, prompts: Sequence[Sequence[int]], steps: Sequence[int], batch_tokens: int
    ) -> Iterator[Represented]:
        if not prompts:
            return
        cached = self._cache_holds
        prefix = None
        if cached and self._greedy_prefix_holds:
            shared = common_prefix(prompts, min(map(len, prompts)) - 1)
            # Left padding needs a mask in any case, so here the prefix costs nothing.
            prefix = self._prefix(prompts[0][:shared]) if shared >= _LEAST_SHARED and len(prompts) > 1 else None
            prefix = prefix if prefix is None or prefix.movable() else None
        lengths = [len(prompt) + count for prompt, count in zip(prompts, steps, strict=True)]
        for batch in length_batches(lengths, batch_tokens if self._padding_holds else 0):
            rows, limits = [prompts[i] for i in batch], [steps[i] for i in batch]
            found = self._greedy(rows, limits, prefix) if cached else self._greedy_uncached(rows, limits)
            for i, (representations, generated) in zip(batch, found, strict=True):
                yield Represented(i, representations, generated)

    @torch.inference_mode()
    def _greedy(
        self, rows: Sequence[Sequence[int]], limits: Sequence[int], prefix: Prefix | None
    ) -> list[tuple[Tensor, Tensor]]:
        """Greedy decoding of one batch with a key-value cache: per row (n, d_tap) and (n,), on the CPU."""
        device = device_of(self.model)
        cache: Any = None
        if prefix is None:
            tokens, mask = pad_left(rows, max(map(len, rows)))
        else:
            width = max(map(len, rows)) - prefix.length
            gaps = torch.tensor([max(map(len, rows)) - len(row) for row in rows])
            # A row shorter than the longest runs the end of the prefix again in front of its own tokens.
            tokens, _ = pad_left([row[-width:] for row in rows], width)
            mask = (torch.arange(prefix.length + width) >= gaps[:, None]).long()
            cache = prefix.shifted(gaps.clamp_max(prefix.length))
        positions = (mask.cumsum(-1) - 1).clamp_min(0)[:, -tokens.shape[1] :]
        tokens, mask, positions = tokens.to(device), mask.to(device), positions.to(device)
        limit = torch.tensor(limits, device=device)
        eos = torch.tensor(self._eos, dtype=torch.long, device=device)
        active = torch.arange(len(rows), device=device)
        count = torch.zeros(len(rows), dtype=torch.long, device=device)
        chosen = torch.zeros(len(rows), int(limit.max()), dtype=torch.long, device=device)
        store: Tensor | None = None
        for step in range(chosen.shape[1]):
            arguments = {"attention_mask": mask, "past_key_values": cache, "use_cache": True}
            if self._takes_positions:
                arguments["position_ids"] = positions
            f, output = self._forward(tokens, lambda x: x[:, -1], last=True, **arguments)
            cache = output.past_key_values
            token = output.logits[:, -1].float().argmax(-1).to(device)
            if store is None:
                store = torch.zeros(*chosen.shape, f.shape[-1], dtype=f.dtype, device=f.device)
            store[active.to(f.device), step] = f
            chosen[active, step] = token
            ended = (count[active] > 0) | torch.isin(token, eos) | (step + 1 >= limit[active])
            count[active] = torch.where(ended & (count[active] == 0), step + 1, count[active])
            finished = int(ended.sum())
            if finished == len(active):
                break
            if finished * _DROP >= len(active):
                keep = (~ended).nonzero()[:, 0]
                select_rows(cache, keep)
                active, mask, positions, token = active[keep], mask[keep], positions[keep], token[keep]
            tokens = token[:, None]
            positions = positions[:, -1:] + 1
            mask = torch.cat([mask, mask.new_ones(len(active), 1)], dim=1)
        assert store is not None
        counts = count.tolist()
        wanted = torch.cat([torch.arange(n) + i * chosen.shape[1] for i, n in enumerate(counts)])
        found = torch.split(store.flatten(0, 1).index_select(0, wanted.to(store.device)).cpu(), counts)
        words = chosen.cpu()
        return [(f, words[i, : counts[i]].clone()) for i, f in enumerate(found)]

    @torch.inference_mode()
    def _greedy_uncached(self, rows: Sequence[Sequence[int]], limits: Sequence[int]) -> list[tuple[Tensor, Tensor]]:
        """Greedy decoding that runs the whole context at every step: slow, and right for every causal model."""
        contexts = [list(row) for row in rows]
        found: list[list[Tensor]] = [[] for _ in rows]
        active = list(range(len(rows)))
        while active:
            tokens = pad_right([contexts[i] for i in active])
            lengths = torch.tensor([len(contexts[i]) for i in active])
            wanted = torch.arange(len(active)) * tokens.shape[1] + lengths - 1

            def pick(x: Tensor, wanted: Tensor = wanted) -> Tensor:
                return x.flatten(0, -2).index_select(0, wanted.to(x.device))

            f, output = self._forward(tokens, pick, last=False, head=lambda x: pick(x)[None], use_cache=False)
            words = output.logits[0].float().argmax(-1).tolist()
            for i, row, word in zip(active, f.cpu(), words, strict=True):
                found[i].append(row)
                contexts[i].append(word)
            active = [i for i in active if contexts[i][-1] not in self._eos and len(found[i]) < limits[i]]
        return [
            (torch.stack(vectors), torch.tensor(context[len(row) :]))
            for vectors, context, row in zip(found, contexts, rows, strict=True)
        ]

    def _forward(
        self,
        tokens: Tensor,
        select: Callable[[Tensor], Tensor],
        *,
        last: bool,
        head: Callable[[Tensor], Tensor] | None = None,
        **arguments: object,
    ) -> tuple[Tensor, CausalLMOutputWithPast]:
        """One forward pass of the model that reads the tap and spares the LM head.

        Args:
            tokens: (rows, length).
            select: which of the (rows, length, d_tap) at the tap are wanted.
            last: whether the logits of the last position are wanted; else the LM head multiplies nothing at all.
            head: what of (rows, length, d) goes into the LM head, where that is something else.
            arguments: the model's own.

        Returns:
            What `select` gave, and the model's output.
        """
        seen: list[Tensor] = []
        embedding = output_embedding(self.model)
        keep = head or ((lambda x: x[..., -1:, :]) if last else (lambda x: x[..., :0, :]))

        def at_tap(_module: nn.Module, given: tuple[Any, ...]) -> None:
            seen.append(select(given[0]))

        def at_head(_module: nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...]:
            return (keep(given[0]), *given[1:])

        tap = embedding if self.tap == "head_input" else self._norm
        handles = [tap.register_forward_pre_hook(at_tap), embedding.register_forward_pre_hook(at_head)]
        with hooked(*handles):
            output = self.model(input_ids=tokens.to(device_of(self.model)), **arguments)
        return seen[0], output

    @cached_property
    def _norm(self) -> nn.Module:
        return find_final_norm(self.model).module

    def _prefix(self, tokens: Sequence[int]) -> Prefix | None:
        """The cache of the tokens that all contexts begin with; None where it is not of a kind that can be shared."""
        with torch.inference_mode():
            _, output = self._forward(torch.tensor([list(tokens)]), lambda x: x[:, -1], last=False, use_cache=True)
        cache = getattr(output, "past_key_values", None)
        return Prefix(cache, len(tokens)) if Prefix.understands(cache) else None

    @cached_property
    def _trial(self) -> list[list[int]]:
        """Three short sequences of different length with a common beginning, to try short cuts on."""
        size = self.model.get_input_embeddings().weight.shape[0]
        words = torch.randint(0, size, (20,), generator=torch.Generator().manual_seed(6)).tolist()
        words = [w for w in words if w not in self._eos and w != getattr(self.model.config, "pad_token_id", None)] or [
            0
        ]
        words = (words * 20)[:20]
        return [words[:4] + words[4:9], words[:4] + words[10:12], words[:4] + words[12:15]]

    def _holds(self, what: str, attempt: Callable[[], Sequence[Tensor]], truth: Callable[[], Sequence[Tensor]]) -> bool:
        """Whether a short cut computes what the plain forward pass does."""
        with evaluating(self.model):
            expected = truth()
            try:
                found = attempt()
                worst = max(
                    ((a.float() - b.float()).abs().max() / b.float().abs().max().clamp_min(1e-6)).item()
                    for a, b in zip(found, expected, strict=True)
                )
            except Exception as error:
                logger.warning("%s: %s is not used: %s", type(self.model).__name__, what, error)
                return False
        # A wrong mask or position moves representations by their own magnitude; half precision by a few hundredths.
        good = worst < (1e-3 if self._head.weight.dtype == torch.float32 else 0.1)
        if not good:
            logger.warning(
                "%s: %s is not used, it moves representations by %.1e of their magnitude.",
                type(self.model).__name__,
                what,
                worst,
            )
        return good

    @cached_property
    def _alone(self) -> list[Tensor]:
        return [self._run_teacher([row], [4], None) for row in self._trial]

    @cached_property
    def _padding_holds(self) -> bool:
        return self._holds(
            "padding",
            lambda: torch.split(self._run_teacher(self._trial, [4] * 3, None), [5, 2, 3]),
            lambda: self._alone,
        )

    @cached_property
    def _teacher_prefix_holds(self) -> bool:
        def attempt() -> Sequence[Tensor]:
            prefix = self._prefix(self._trial[0][:3])
            if prefix is None:
                raise TypeError("its cache is of a kind that is not known")
            return torch.split(self._run_teacher([row[3:] for row in self._trial], [1] * 3, prefix), [5, 2, 3])

        return self._padding_holds and self._holds("the shared prefix", attempt, lambda: self._alone)

    def _greedy_trial(self, prefix_length: int) -> Sequence[Tensor]:
        prefix = self._prefix(self._trial[0][:prefix_length]) if prefix_length else None
        if prefix_length and (prefix is None or not prefix.movable()):
            raise TypeError("its cache is of a kind that is not known")
        return [f for f, _ in self._greedy(self._trial, [4, 1, 3], prefix)]

    @cached_property
    def _cache_holds(self) -> bool:
        return self._padding_holds and self._holds(
            "the key-value cache", lambda: self._greedy_trial(0), lambda: self._greedy_truth
        )

    @cached_property
    def _greedy_prefix_holds(self) -> bool:
        return self._cache_holds and self._holds(
            "the shared prefix", lambda: self._greedy_trial(3), lambda: self._greedy_truth
        )

    @cached_property
    def _greedy_truth(self) -> list[Tensor]:
        return [f for f, _ in self._greedy_uncached(self._trial, [4, 1, 3])]


def pays(shared: int, sequences: Sequence[Sequence[int]]) -> bool:
    """Whether sharing the first `shared` tokens of `teacher` contexts saves more than it costs.

    The rows that attend to a shared prefix need a mask and a copy of its keys and values, where whole rows take the
    plain causal attention. On a CPU the two break even at a tenth of the tokens, and never below a few.
    """
    mean = sum(map(len, sequences)) / max(1, len(sequences))
    return len(sequences) > 1 and shared >= max(_LEAST_SHARED, mean / 8)


def select_rows(cache: Cache, keep: Tensor) -> None:
    """Keep some rows of a key-value cache."""
    for layer in cache.layers:
        layer.batch_select_indices(keep)
