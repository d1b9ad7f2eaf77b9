"""Batches of prompts: how they are formed, and the tokens that the model's own `generate` gives for one.

A batch is the unit of generation: it may be decoded in any process, and gives the same tokens.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from transformers import GenerationConfig

from pema.errors import ConfigError, PemaError
from pema.generation.settings import ARGUMENTS
from pema.generation.texts import StopStrings, TokenLimits
from pema.owner.causal_lm import state_argument
from pema.owner.contract import SharesPrefix
from pema.tasks.template import EncodedExample

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from pema.owner.contract import PLM, PromptPrefix

Inputs = Callable[[list[int]], AbstractContextManager[object]]
"""Function of SL of each input of a batch; it builds the context manager around the model's call."""


def plain(source_lengths: list[int]) -> AbstractContextManager[None]:
    """Return an empty context manager: the `Inputs` of a model that needs none."""
    return contextlib.nullcontext()


@dataclass(frozen=True)
class Decoding:
    """What all batches of a call have in common.

    Attributes:
        settings: of the model's `generate`, checked; `num_beams`, `do_sample` and `eos_token_id`, a list, are set.
        stop: the stop strings.
        seed: of sampling.
    """

    settings: Mapping[str, Any]
    stop: Sequence[str]
    seed: int


@dataclass(frozen=True)
class Batch:
    """Prompts that are decoded together.

    Attributes:
        number: its place among the batches of a call, from 0.
        sources: the places of its sources in the call.
        prompts: the prompts.
        limits: maximum number of new tokens of each.
    """

    number: int
    sources: list[int]
    prompts: list[EncodedExample]
    limits: list[int]

    def __len__(self) -> int:
        return len(self.sources)


def batches(prompts: Sequence[EncodedExample], limits: Sequence[int], size: int, *, alike: bool) -> list[Batch]:
    """Return the batches; with `alike` each contains prompts of equal length, without padding.

    The longest come first: a batch that does not fit into memory fails at once, and padding is minimal.
    """
    order = sorted(range(len(prompts)), key=lambda i: (len(prompts[i].prompt), limits[i]), reverse=True)
    chosen = []
    for _, group in itertools.groupby(order, key=lambda i: len(prompts[i].prompt) if alike else 0):
        numbers = list(group)
        chosen += [numbers[start : start + size] for start in range(0, len(numbers), size)]
    return [
        Batch(number, each, [prompts[i] for i in each], [limits[i] for i in each]) for number, each in enumerate(chosen)
    ]


def shared_prefix(
    plm: PLM, model: PreTrainedModel, prompts: Sequence[Sequence[int]], settings: Mapping[str, Any]
) -> PromptPrefix | None:
    """Return the common prefix of all prompts, encoded once; None if the model or the settings do not allow it."""
    own_cache = settings.get("use_cache") is False or any(map(settings.get, ("cache_implementation", "cache_config")))
    if own_cache or not isinstance(plm, SharesPrefix) or model is not plm.generator:
        return None
    return plm.prompt_prefix(prompts)


@torch.no_grad()
def write_batch(
    plm: PLM, model: PreTrainedModel, batch: Batch, decoding: Decoding, inputs: Inputs, prefix: PromptPrefix | None
) -> list[list[int]]:
    """Return the new tokens of each row, up to its limit or to its end-of-sequence token, which is included.

    A row that ended at a stop string may be followed by other tokens. Sampling is seeded by the call's seed and the
    batch's number, and the state of the global random generators is restored afterwards.

    Raises:
        ConfigError: the model's `generate` refuses the settings.
    """
    with (
        inputs([prompt.source_length for prompt in batch.prompts]),
        _seeded(model, decoding.seed, batch.number) if decoding.settings["do_sample"] else contextlib.nullcontext(),
    ):
        return _generated(plm, model, batch, decoding, prefix)


def _generated(
    plm: PLM, model: PreTrainedModel, batch: Batch, decoding: Decoding, prefix: PromptPrefix | None
) -> list[list[int]]:
    settings, limits = decoding.settings, batch.limits
    tokenizer, device, ends = plm.tokenizer, model.device, settings["eos_token_id"]
    pad = tokenizer.pad_token_id
    if pad is None:
        pad = ends[0] if ends else 0
    columns = max(len(encoded.prompt) for encoded in batch.prompts)
    ids = torch.full((len(batch), columns), pad, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, encoded in enumerate(batch.prompts):
        ids[row, columns - len(encoded.prompt) :] = torch.tensor(encoded.prompt)
        mask[row, columns - len(encoded.prompt) :] = 1
    arguments = {name: settings[name] for name in ARGUMENTS if settings.get(name)}
    criteria: list[Any] = [TokenLimits(columns, torch.tensor(limits)), *arguments.get("stopping_criteria", [])]
    stops = [StopStrings(tokenizer, columns, decoding.stop)] if decoding.stop else []
    arguments["stopping_criteria"] = [*criteria, *stops]
    fields = {name: value for name, value in settings.items() if name not in ARGUMENTS}
    fields |= {"eos_token_id": ends or None, "pad_token_id": pad, "max_new_tokens": max(limits)}
    if prefix is not None:
        gaps = columns - mask.sum(-1).repeat_interleave(settings["num_beams"])
        arguments[str(state_argument(model))] = prefix.shifted(gaps.clamp_max(prefix.length))
    if settings.get("min_new_tokens"):
        fields["min_new_tokens"] = min(settings["min_new_tokens"], max(limits))
    try:
        config = GenerationConfig(**fields)
        out = model.generate(
            input_ids=ids.to(device), attention_mask=mask.to(device), generation_config=config, **arguments
        )
    except PemaError:
        raise
    except (ValueError, TypeError, ImportError, AssertionError, NotImplementedError) as error:
        if settings.keys() <= {"num_beams", "do_sample", "eos_token_id"}:
            raise
        given = ", ".join(f"{name}={value!r}" for name, value in settings.items())
        raise ConfigError(f"the model cannot generate with {given}: {error}") from error
    rows = [row[:limit] for row, limit in zip(out[:, columns:].tolist(), limits, strict=True)]
    firsts = [next((i for i, token in enumerate(row) if token in ends), len(row)) for row in rows]
    rows = [row[: first + 1] for row, first in zip(rows, firsts, strict=True)]
    if settings.get("stopping_criteria"):
        # A row that has stopped is padded until the others finish.
        rows = [row[: len(row) - _trailing(row, pad)] if pad not in ends else row for row in rows]
    return rows


@contextlib.contextmanager
def _seeded(model: PreTrainedModel, seed: int, number: int) -> Iterator[None]:
    """Seed sampling of a batch inside the block, and restore the state of the random generators afterwards."""
    kind = model.device.type
    devices = [] if kind == "cpu" else [model.device]
    with torch.random.fork_rng(devices, device_type=kind if devices else "cuda"):
        torch.manual_seed((seed + number * 0x9E3779B97F4A7C15) % (1 << 63))
        yield


def _trailing(row: Sequence[int], token: int) -> int:
    return sum(1 for _ in itertools.takewhile(lambda each: each == token, reversed(row)))
