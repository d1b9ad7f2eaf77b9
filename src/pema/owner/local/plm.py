"""A transformers causal LM in this process, behind the owner's contract."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from operator import itemgetter
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pema.devices import is_asynchronous
from pema.owner import loading
from pema.owner.batching import Fitting, common_prefix, length_batches
from pema.owner.contract import ACCELERATOR_TOKENS, BATCH_TOKENS, ContextRepresentations, PLMDescription, Tap
from pema.owner.derivation import derive_head
from pema.owner.head import Head
from pema.owner.loading import DeviceMap
from pema.owner.local.encoded import cached, whole
from pema.owner.local.greedy import greedy
from pema.owner.local.growing import GrowingContexts
from pema.owner.local.prefix import Prefix
from pema.owner.local.running import Runner
from pema.owner.local.session import LocalSession
from pema.owner.local.shortcuts import ShortCuts
from pema.owner.local.support import require_supported
from pema.owner.requests import require_prompts, require_sequences, require_session
from pema.owner.session_model import SessionModel
from pema.owner.weights import device_of, model_fingerprints

_LEAST_SHARED = 4
"""Minimum length of a shared prefix that pays for its separate forward pass."""

_LEAST_SAVED = 256
"""Minimum number of prompt tokens that a shared prefix must save in decoding, to pay for its separate pass."""


class LocalPLM:
    """A frozen causal language model in this process.

    Each shortcut (padding, key-value cache, a shared prefix) is verified on first use against the plain forward pass;
    a shortcut that is not exact for the architecture is not used, and logged. The representations equal those of a
    plain forward pass of each context alone, for every batch, to rounding: with the bundled PLM at most 1e-6 of their
    magnitude in float32, 3e-3 in float16 and 2e-2 in bfloat16.

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
        weights: str = "",
    ) -> None:
        """Wrap a model and its tokenizer.

        Args:
            model: an unmodified causal language model of transformers, with its weights.
            tokenizer: its tokenizer.
            tap: where representations are read.
            name: name of the PLM; default: the model's name.
            weights: how the weights were quantised before they were widened; empty if they were not.

        Raises:
            OwnerError: the model is of another kind, contains a PEFT adapter, has no weights, or its head is not
                supported.
            ConfigError: an unknown tap.
        """
        require_supported(model, tokenizer)
        self.model = model.eval()
        self._tokenizer = tokenizer
        self.tap: Tap = tap
        self._name = name or loading.name_of(model)
        self._weights = weights
        self._head = derive_head(model, tap)
        self._eos = loading.eos_token_ids(self.model, tokenizer)
        self._runner = Runner(self.model, tap, self._eos)
        self._short_cuts = ShortCuts(self._runner, self.max_length)
        self._fitting = Fitting()

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
            name: a hub name, a local folder, a GGUF file, or the name of a packaged PLM.
            tap: where representations are read.
            dtype: a type, its name, or "auto" (the checkpoint's); None means "auto", but float32 for half precision
                in which the processor is slow.
            device_map: as in transformers; None means the CPU.
            revision: branch, tag or commit on the hub.

        Raises:
            OwnerError: it cannot be loaded, or its head is not supported.
        """
        model, tokenizer, called, weights = loading.load(name, dtype=dtype, device_map=device_map, revision=revision)
        return cls(model, tokenizer, tap=tap, name=called, weights=weights)

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The PLM's tokenizer."""
        return self._tokenizer

    @cached_property
    def generator(self) -> PreTrainedModel:
        """The model itself, or one over decoding sessions if its own `generate` makes rows depend on their batch."""
        # The prefix is tried here too, because an adapter that is attached later would take part in the trial.
        exact = self._short_cuts.generate_prefix or self._short_cuts.generate
        return self.model if exact else SessionModel(self)

    def head(self) -> Head:
        """Return the head bundle, which shares the model's memory."""
        return self._head

    @cached_property
    def description(self) -> PLMDescription:
        """Description of the PLM; the weights are hashed on first use."""
        model, tokenizer = model_fingerprints(self.model), loading.tokenizer_fingerprints(self._tokenizer)
        return PLMDescription(
            name=self._name,
            architecture=type(self.model).__name__,
            fingerprint=model.current,
            tokenizer_fingerprint=tokenizer.current,
            head_fingerprint=self._head.fingerprint,
            d=self._head.d,
            d_tap=self._head.d_tap,
            vocabulary_size=self._head.vocabulary_size,
            tap=self.tap,
            max_length=self.max_length,
            eos_token_ids=self._eos,
            parameters=sum(p.numel() for p in self.model.parameters()),
            weights=self._weights,
            earlier=model.earlier,
            earlier_tokenizers=tokenizer.earlier,
        )

    @cached_property
    def max_length(self) -> int:
        """Maximum number of tokens of a context."""
        return loading.max_length(self.model, self._tokenizer)

    @property
    def batch_tokens(self) -> int:
        """Maximum tokens of a batch suited to the device; see `contract.SizesBatches`."""
        return ACCELERATOR_TOKENS if is_asynchronous(device_of(self.model)) else BATCH_TOKENS

    def represent(
        self,
        sequences: Sequence[Sequence[int]],
        starts: Sequence[int],
        *,
        batch_tokens: int = BATCH_TOKENS,
        skip: frozenset[int] = frozenset(),
    ) -> Iterator[ContextRepresentations]:
        """Represent `teacher` contexts; see `contract.PLM.represent`."""
        require_sequences(sequences, starts, self.max_length)
        return self._represent(sequences, starts, batch_tokens, skip)

    def predict(
        self,
        prompts: Sequence[Sequence[int]],
        steps: Sequence[int],
        *,
        batch_tokens: int = BATCH_TOKENS,
        skip: frozenset[int] = frozenset(),
    ) -> Iterator[ContextRepresentations]:
        """Represent `predicted` contexts; see `contract.PLM.predict`."""
        require_prompts(prompts, steps, self.max_length)
        return self._predict(prompts, steps, batch_tokens, skip)

    def prompt_prefix(self, prompts: Sequence[Sequence[int]]) -> Prefix | None:
        """Encode the common prefix of the prompts of `generator.generate`; see `contract.SharesPrefix`."""
        shared = _worth_sharing(prompts)
        return self._movable_prefix(prompts[0][:shared]) if shared and self._short_cuts.generate_prefix else None

    def open_session(self, prompts: Sequence[Sequence[int]]) -> LocalSession:
        """Open a decoding session; see `contract.PLM.open_session`."""
        size = self._head.vocabulary_size
        require_session(prompts, self.max_length, size)
        shared = _worth_sharing(prompts)
        prefix = self._movable_prefix(prompts[0][:shared]) if shared and self._short_cuts.greedy_prefix else None
        return LocalSession(
            self._growing(prompts, prefix),
            [len(prompt) for prompt in prompts],
            max_length=self.max_length,
            vocabulary_size=size,
            device=device_of(self.model),
        )

    def _represent(
        self, sequences: Sequence[Sequence[int]], starts: Sequence[int], batch_tokens: int, skip: frozenset[int]
    ) -> Iterator[ContextRepresentations]:
        if not sequences:
            return
        # The last token of a sequence is only a target, so no context contains it. If the position encoding depends on
        # the length, the contexts of a sequence are run in ranges of one encoding each.
        pieces: dict[bytes, list[tuple[int, int, int]]] = {}
        count = [0] * len(sequences)
        for i, (sequence, start) in enumerate(zip(sequences, starts, strict=True)):
            for first, last in self._runner.positions.stretches(start, len(sequence) - 1):
                pieces.setdefault(self._runner.positions.of(last), []).append((i, first, last))
                count[i] += 1
        shared = common_prefix(sequences, min(starts) - 1) if self._short_cuts.teacher_prefix else 0
        parts: dict[int, list[tuple[int, Tensor]]] = {}
        for encoding, of_encoding in pieces.items():
            for (i, first, _), f in self._passes(sequences, of_encoding, shared, encoding, batch_tokens, skip):
                parts.setdefault(i, []).append((first, f))
                if len(parts[i]) == count[i]:
                    ordered = [part for _, part in sorted(parts.pop(i), key=itemgetter(0))]
                    yield ContextRepresentations(i, ordered[0] if len(ordered) == 1 else torch.cat(ordered))

    def _passes(
        self,
        sequences: Sequence[Sequence[int]],
        pieces: Sequence[tuple[int, int, int]],
        shared: int,
        encoding: bytes,
        batch_tokens: int,
        skip: frozenset[int],
    ) -> Iterator[tuple[tuple[int, int, int], Tensor]]:
        """Run contexts of one position encoding in batches of similar length.

        Args:
            sequences: the tokens.
            pieces: (i, first, last), the contexts with first to last tokens of sequence i.
            shared: length of the common prefix of all sequences.
            encoding: position encoding of the pieces.
            batch_tokens: maximum of rows times longest.
            skip: sequences that are not yielded.
        """
        rows = [sequences[i][:last] for i, _, last in pieces]
        fits = pays(shared, rows) and self._runner.positions.of(shared) == encoding
        prefix = self._runner.prefix(rows[0][:shared]) if fits else None
        shorter = 0 if prefix is None else prefix.length
        lengths = [len(row) - shorter for row in rows]

        def represented(batch: list[int]) -> Tensor:
            starts = [pieces[place][1] - shorter for place in batch]
            return self._runner.teacher([rows[place][shorter:] for place in batch], starts, prefix)

        for batch in length_batches(lengths, batch_tokens if self._short_cuts.padding else 0):
            if all(pieces[place][0] in skip for place in batch):
                continue
            for part, f in self._fitting.run(batch, lengths, represented):
                chosen = [pieces[place] for place in part]
                split = torch.split(f, [last - first + 1 for _, first, last in chosen])
                yield from ((piece, rows) for piece, rows in zip(chosen, split, strict=True) if piece[0] not in skip)

    def _predict(
        self, prompts: Sequence[Sequence[int]], steps: Sequence[int], batch_tokens: int, skip: frozenset[int]
    ) -> Iterator[ContextRepresentations]:
        if not prompts:
            return
        prefix = self._greedy_prefix(prompts)
        lengths = [len(prompt) + count for prompt, count in zip(prompts, steps, strict=True)]

        def predicted(batch: list[int]) -> list[tuple[Tensor, Tensor]]:
            contexts = self._growing([prompts[i] for i in batch], prefix)
            return greedy(contexts, [steps[i] for i in batch], self._eos)

        for batch in length_batches(lengths, batch_tokens if self._short_cuts.padding else 0):
            if skip.issuperset(batch):
                continue
            for part, results in self._fitting.run(batch, lengths, predicted):
                for i, (representations, generated) in zip(part, results, strict=True):
                    if i not in skip:
                        yield ContextRepresentations(i, representations, generated)

    def _greedy_prefix(self, prompts: Sequence[Sequence[int]]) -> Prefix | None:
        if len(prompts) < 2 or not self._short_cuts.greedy_prefix:
            return None
        shared = common_prefix(prompts, min(map(len, prompts)) - 1)
        # Left padding needs a mask anyway, so the prefix costs nothing here.
        return self._movable_prefix(prompts[0][:shared]) if shared >= _LEAST_SHARED else None

    def _movable_prefix(self, tokens: Sequence[int]) -> Prefix | None:
        prefix = self._runner.prefix(tokens)
        return prefix if prefix is not None and prefix.movable() else None

    @torch.inference_mode()
    def _growing(self, rows: Sequence[Sequence[int]], prefix: Prefix | None = None) -> GrowingContexts:
        if self._short_cuts.cache:
            return cached(self._runner, rows, prefix)
        if self._short_cuts.unpadded_cache:
            return cached(self._runner, rows, padding=False)
        return whole(self._runner, rows, together=self._short_cuts.padding)


def _worth_sharing(prompts: Sequence[Sequence[int]]) -> int:
    """Return the length of the prompts' common prefix; 0 if a separate pass would not pay."""
    shared = common_prefix(prompts, min(map(len, prompts), default=0) - 1)
    return shared if shared * (len(prompts) - 1) >= _LEAST_SAVED else 0


def pays(shared: int, sequences: Sequence[Sequence[int]]) -> bool:
    """Return whether sharing the first `shared` tokens of `teacher` contexts saves more than it costs.

    Rows with a shared prefix need a mask and a copy of its keys and values, whereas whole rows use plain causal
    attention. On a CPU the two break even at a tenth of the tokens, and never below a few tokens.
    """
    mean = sum(map(len, sequences)) / max(1, len(sequences))
    return len(sequences) > 1 and shared >= max(_LEAST_SHARED, mean / 8)
