"""Generation and classification on a Ray cluster: replicas of the PLM run the batches that one process would run.

A replica gets the adapter's weights as bytes in the format of its file, so that only this process reads the adapter's
folder. Batches, their order, their seeds and the prompts' common prefix are those of one process, so the tokens are.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from safetensors import torch as safetensors

from pema.adapter.config import AdapterConfig
from pema.adapter.module import Adapter
from pema.adapter.schedule import NamedSchedule, Schedule
from pema.cluster.worker import Answer
from pema.errors import ConfigError
from pema.generation.batches import Batch, Decoding, plain, shared_prefix, write_batch
from pema.generation.plugin import AttachedAdapter, attach_to
from pema.generation.search import Part, Scores, search_part
from pema.generation.settings import without_own_settings
from pema.owner.contract import PLM, GivesProposals
from pema.owner.positions import PositionEncoding

if TYPE_CHECKING:
    from pema.cluster.replicas import Replicas

NAMED = 3
"""Maximum number of sources that a message names."""


@dataclass(frozen=True)
class Sent:
    """An adapter as it is sent: config and schedule as JSON, the weights in safetensors."""

    name: str
    config: dict[str, Any]
    weights: bytes
    schedule: dict[str, Any]

    @classmethod
    def of(cls, adapter: Adapter, schedule: NamedSchedule) -> Sent:
        """Return an adapter with the schedule to use."""
        tensors = {name: tensor.detach().contiguous() for name, tensor in adapter.state_dict().items()}
        return cls(adapter.name, adapter.config.to_dict(), safetensors.save(tensors), schedule.to_dict())

    def received(self) -> tuple[Adapter, NamedSchedule]:
        """Return the adapter and the schedule."""
        adapter = Adapter.of(AdapterConfig.from_dict(self.config), safetensors.load(self.weights), self.name)
        return adapter, NamedSchedule.from_dict(self.schedule)


@dataclass(frozen=True)
class Job:
    """What all batches have in common.

    Attributes:
        adapter: the adapter; None for the PLM alone.
        decoding: their settings.
        prompts: some prompts whose common prefix and least length are those of all.
        count: number of all prompts.
    """

    adapter: Sent | None
    decoding: Decoding
    prompts: list[tuple[int, ...]]
    count: int


def require_decoding(replicas: Replicas) -> None:
    """Refuse replicas that do not decode.

    Raises:
        ConfigError: the PLM is an API that gives its likeliest tokens only.
    """
    if replicas.ask(_proposes)["proposes"]:
        raise ConfigError(
            f"{replicas.description.name} gives its likeliest tokens only: one process sends its requests side by side "
            "and keeps its budget. Generate without replicas, engine='process'."
        )


def requires_alike(replicas: Replicas) -> bool:
    """Return whether the PLM's position encoding requires batches of rows of equal length."""
    return bool(replicas.ask(_varies)["varies"])


def write_with(
    replicas: Replicas, adapter: Adapter | None, schedule: Schedule, batches: Sequence[Batch], decoding: Decoding
) -> Iterator[tuple[Batch, list[list[int]]]]:
    """Yield the batches, as they are decoded, with the tokens of their rows; see `write_batch`.

    Raises:
        ConfigError: the schedule or a setting cannot be sent.
        ProcessError: a batch ended several replicas, or there are none left.
    """
    for name, value in decoding.settings.items():
        try:
            json.dumps(value)
        except (TypeError, ValueError) as error:
            raise ConfigError(
                f"{name} is an object of this process, which replicas cannot have: give numbers, texts and lists only, "
                "or leave the replicas out."
            ) from error
    prompts = [prompt.prompt for batch in batches for prompt in batch.prompts]
    ends = [min(prompts), max(prompts), min(prompts, key=len)] if prompts else []
    job = Job(_sent(adapter, schedule), decoding, ends[: len(prompts)], len(prompts))
    answers = replicas.work(
        decoded,
        job,
        batches,
        lambda batch: (batch,),
        name=lambda batch: _name(batch.sources),
        remedy="give a smaller batch_size",
    )
    for batch, answer in answers:
        yield batch, answer["rows"]


@contextlib.contextmanager
def decoded(plm: PLM, job: Job) -> Iterator[Callable[[Batch], Answer]]:
    """Yield a function of a batch that decodes it, in a replica."""
    model = plm.generator
    with _attached(plm, job.adapter) as attached:
        inputs = plain if attached is None else attached.inputs
        prompts = [*job.prompts, *job.prompts[-1:] * (job.count - len(job.prompts))]
        prefix = shared_prefix(plm, model, prompts, job.decoding.settings)
        yield lambda batch: {"rows": write_batch(plm, model, batch, job.decoding, inputs, prefix)}


@dataclass(frozen=True)
class LabelJob:
    """What all parts of a classification have in common: the adapter, and whether every label is scored."""

    adapter: Sent | None
    every: bool


def search_with(
    replicas: Replicas, adapter: Adapter | None, schedule: Schedule, parts: Sequence[Part], *, every: bool
) -> Iterator[tuple[Part, Scores]]:
    """Yield parts of a classification, as they are searched, with their scores; see `search`.

    Raises:
        ConfigError: the schedule cannot be sent.
        ProcessError: a part ended several replicas, or there are none left.
    """
    answers = replicas.work(
        searched,
        LabelJob(_sent(adapter, schedule), every),
        parts,
        lambda part: (part,),
        name=lambda part: _name(part.sources),
        remedy="give a smaller batch_size",
    )
    for part, answer in answers:
        yield part, answer["scores"]


@contextlib.contextmanager
def searched(plm: PLM, job: LabelJob) -> Iterator[Callable[[Part], Answer]]:
    """Yield a function of a part that searches its labels, in a replica."""
    with _attached(plm, job.adapter) as attached:
        inputs = None if attached is None else attached.inputs
        yield lambda part: {"scores": search_part(plm.generator, part, inputs, job.every)}


@contextlib.contextmanager
def _attached(plm: PLM, sent: Sent | None) -> Iterator[AttachedAdapter | None]:
    """Attach an adapter that was sent, if any, to the PLM's model, whose own settings are ignored in the block."""
    plugged = contextlib.nullcontext() if sent is None else attach_to(plm, *sent.received())
    with plugged as attached, without_own_settings(plm.generator):
        yield attached


def _sent(adapter: Adapter | None, schedule: Schedule) -> Sent | None:
    if adapter is None:
        return None
    if not isinstance(schedule, NamedSchedule):
        raise ConfigError(
            f"the schedule {schedule!r} is an object of this process, which replicas cannot have: give one of "
            "pema's own, or leave the replicas out."
        )
    return Sent.of(adapter, schedule)


def _proposes(plm: PLM) -> Answer:
    return {"proposes": isinstance(plm, GivesProposals) and plm.proposer is not None}


def _varies(plm: PLM) -> Answer:
    return {"varies": PositionEncoding(plm.generator).varies}


def _name(sources: Sequence[int]) -> str:
    numbers = [str(i + 1) for i in sorted(sources)]
    rest = f" and {len(numbers) - NAMED:,} others" if len(numbers) > NAMED else ""
    return f"the source{'s' if len(numbers) > 1 else ''} {', '.join(numbers[:NAMED])}{rest}"
