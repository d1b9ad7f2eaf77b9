"""Classification: the most probable label of a list after each prompt, the end of the label included.

P(label | prompt) is the product of the probabilities of the label's tokens and of the token that ends it, under the
model in its current state: the distribution at each step, and the adapter's weight lambda_t, are those of generation.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pema.adapter.schedule import Schedule
from pema.adapter.task import require_task
from pema.cluster.replicas import Replicas
from pema.console import progress
from pema.errors import ConfigError, DataError
from pema.generation.config import LARGEST, GenerateConfig
from pema.generation.decoding import adapters_task, schedule_of
from pema.generation.labels import LabelTree, label_trees
from pema.generation.plugin import attach_to
from pema.generation.replicated import requires_alike, search_with
from pema.generation.search import Part, RowInputs, Scores, search_part
from pema.generation.settings import without_own_settings
from pema.owner.contract import BATCH_TOKENS, require_open
from pema.owner.positions import PositionEncoding
from pema.schema import require
from pema.tasks.example import Example, require_sources
from pema.tasks.labels import require_labels
from pema.tasks.registry import Task, chosen_task
from pema.tasks.template import EncodedExample

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from pema.adapter.module import Adapter
    from pema.owner.contract import PLM

WIDTH = 4
"""Number of beginnings of labels that a first search follows at each depth, if only the best label is asked for."""

ROWS = 256
"""Maximum number of rows of a pass with several prompts, the default limit of a server's sessions."""

MARGIN = 1.0
"""Nats by which two searches may differ: in bfloat16, log P of a label varies by up to about 0.5 with the batch."""


@dataclass(frozen=True)
class Classification:
    """Labels chosen for a list of sources.

    Attributes:
        choices: the most probable label of each source, in the order of the sources; of equally probable ones the
            first.
        labels: all labels, in the given order.
        log_probs: (sources, labels) float64, log P(label | prompt); None if only the best labels were computed.
    """

    choices: list[str]
    labels: tuple[str, ...]
    log_probs: Tensor | None

    @property
    def probabilities(self) -> Tensor:
        """(sources, labels) float64, the probability of each label if the text is one of them: each row sums to 1.

        Raises:
            ConfigError: only the best labels were computed.
        """
        if self.log_probs is None:
            raise ConfigError("only the best labels were computed: leave out probabilities=False.")
        return torch.softmax(self.log_probs, dim=-1)


def classify(
    plm: PLM | Replicas,
    adapter: Adapter | None,
    sources: Sequence[str | Example],
    labels: Sequence[str],
    task: str | Task | None = None,
    schedule: Schedule | str | None = None,
    *,
    lambda_max: float | None = None,
    batch_size: int = GenerateConfig.batch_size,
    probabilities: bool = True,
) -> Classification:
    """Choose the most probable label of each source.

    A choice depends on its own source only, not on the rest of its batch, to rounding as in `pema.generate`.

    Args:
        plm: the PLM, or `replicas` of one on a Ray cluster.
        adapter: the adapter, or None for the PLM alone.
        sources: the texts that fill the template's slot; an example stands for its source and its history.
        labels: the labels to choose from, as they are written in the targets of training.
        task: the task or its name; its template builds the prompts. None means the adapter's own task.
        schedule: the adapter's weight per step, or the name of a schedule; None means the adapter's own schedule.
        lambda_max: the weight that a named schedule, or the adapter's own, begins with.
        batch_size: maximum number of sources per batch.
        probabilities: whether to compute the probability of every label; without, labels that cannot be the most
            probable one are not read to their end, which is several times faster with many labels.

    Raises:
        DataError: a source is blank, or too long for the PLM; or a label cannot be a target, or all have probability 0.
        ConfigError: there are no labels, or one is blank, given twice or has the tokens of another; a setting is
            invalid; or no task is given.
        MismatchError: the adapter belongs to another PLM, task or template.
    """
    require_open(plm)
    chosen = adapters_task(adapter) if task is None else chosen_task(task)
    mixture = schedule_of(adapter, schedule, lambda_max)
    if adapter is not None:
        chosen = require_task(adapter.config, chosen, plm.tokenizer)
    if isinstance(plm, Replicas):
        if adapter is not None:
            adapter.require(plm.description)
        searched = partial(search_with, plm, adapter, mixture, every=probabilities)
        settings: dict[str, Any] = {"batch_size": batch_size, "probabilities": probabilities}
        return _choose(plm, sources, labels, chosen, searched, alike=requires_alike(plm), **settings)
    with contextlib.ExitStack() as stack:
        inputs: RowInputs | None = None
        if adapter is not None:
            inputs = stack.enter_context(attach_to(plm, adapter, mixture)).inputs
        return choose_labels(
            plm, plm.generator, sources, labels, chosen, inputs, batch_size=batch_size, probabilities=probabilities
        )


def choose_labels(
    plm: PLM,
    model: PreTrainedModel,
    sources: Sequence[str | Example],
    labels: Sequence[str],
    task: Task,
    inputs: RowInputs | None = None,
    /,
    *,
    max_length: int | None = None,
    batch_size: int = GenerateConfig.batch_size,
    probabilities: bool = True,
) -> Classification:
    """Choose labels with a model in its current state, plug-ins included; see `classify`.

    Args:
        plm: provides the tokenizer and the context window.
        model: the PLM's model, or one derived from it.
        sources: see `classify`.
        labels: see `classify`.
        task: the task; its template builds the prompts.
        inputs: builds the context manager around a forward pass, for models that need one.
        max_length: maximum number of tokens of a prompt and a label together, within the PLM's context window.
        batch_size: see `classify`.
        probabilities: see `classify`.

    Raises:
        DataError: see `classify`.
        ConfigError: see `classify`.
    """

    def searched(parts: Sequence[Part]) -> Iterator[tuple[Part, Scores]]:
        return ((part, search_part(model, part, inputs, probabilities)) for part in parts)

    # A model whose position encoding depends on the longest row of a batch gets rows of equal length only.
    settings: dict[str, Any] = {"max_length": max_length, "batch_size": batch_size, "probabilities": probabilities}
    with without_own_settings(model):
        return _choose(plm, sources, labels, task, searched, alike=PositionEncoding(model).varies, **settings)


def _choose(
    plm: PLM | Replicas,
    sources: Sequence[str | Example],
    labels: Sequence[str],
    task: Task,
    searched: Callable[[Sequence[Part]], Iterable[tuple[Part, Scores]]],
    *,
    alike: bool,
    max_length: int | None = None,
    batch_size: int,
    probabilities: bool,
) -> Classification:
    """Choose labels by the scores of `searched`, which searches in this process or elsewhere; see `choose_labels`."""
    require("batch_size", batch_size, int, least=1, most=LARGEST)
    labels = require_labels(labels)
    given = require_sources(sources)
    prompts = task.template.encode_prompts(plm.tokenizer, given)
    trees = label_trees(task.template, plm.tokenizer, given, prompts, labels)
    window = min(plm.description.max_length, max_length or plm.description.max_length)
    for number, (prompt, tree) in enumerate(zip(prompts, trees, strict=True), 1):
        if len(prompt.prompt) + len(tree.levels) > window:
            raise DataError(
                f"source {number}: its prompt has {len(prompt.prompt)} tokens and the longest label "
                f"{len(tree.levels)}, and the PLM takes {window} together: shorten it."
            )
    scores = torch.empty(len(prompts), len(labels), dtype=torch.float64)
    width, pending = None if probabilities else WIDTH, list(range(len(prompts)))
    floors: Tensor | None = None
    with progress("Classifying", len(prompts), "texts") as advance:
        while pending:
            missed = torch.full((len(prompts),), -torch.inf, dtype=torch.float64)
            parts = [
                Part(
                    batch,
                    trees[batch[0]],
                    [prompts[i] for i in batch],
                    width,
                    None if floors is None else floors[batch],
                )
                for batch in _batches(prompts, trees, pending, batch_size, width, alike=alike)
            ]
            for part, scored in searched(parts):
                scores[part.sources], missed[part.sources] = scored
                advance(len(part.sources) if floors is None else 0)
            # A first search of a few beginnings is right unless one that it left out was as probable as its best label:
            # a label is at most as probable as its beginning. Those sources are searched once more, without a limit,
            # for labels that are at least as probable as the best one so far.
            floors, width = scores.amax(1) - MARGIN, None
            pending = ((missed >= floors) & (missed > -torch.inf)).nonzero()[:, 0].tolist()
    impossible = scores.amax(1).isneginf().nonzero()[:, 0].tolist()
    if impossible:
        raise DataError(
            f"source {impossible[0] + 1}: every label has probability 0, because the adapter's vocabulary lacks their "
            "tokens and its weight is 1: lower lambda_max, or train with labels of this list."
        )
    best = scores.numpy().argmax(1) if len(prompts) else ()
    return Classification([labels[i] for i in best], tuple(labels), scores if probabilities else None)


def _batches(
    prompts: Sequence[EncodedExample],
    trees: Sequence[LabelTree],
    chosen: Sequence[int],
    size: int,
    width: int | None,
    *,
    alike: bool,
) -> Iterator[list[int]]:
    """Yield the prompt indices of each batch: prompts with the same tree, the longest first.

    A prompt's keys and values are repeated for the nodes of a level, so these rows, and their tokens, are limited. A
    single prompt is always a batch.
    """
    order = sorted(chosen, key=lambda i: (id(trees[i]), -len(prompts[i].prompt)))
    batch: list[int] = []
    for i in order:
        if batch:
            tree, longest = trees[batch[0]], len(prompts[batch[0]].prompt)
            nodes = tree.widest if width is None else min(width, tree.widest)
            rows = (len(batch) + 1) * nodes
            fits = rows <= ROWS and rows * (longest + len(tree.levels)) <= BATCH_TOKENS
            same = trees[i] is tree and not (alike and len(prompts[i].prompt) != longest)
            if not (same and fits and len(batch) < size):
                yield batch
                batch = []
        batch.append(i)
    if batch:
        yield batch
