"""Search in a tree of labels with a causal language model: one pass for the prompts, then one per depth."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from pema.generation.labels import LabelTree, Level
from pema.owner.batching import pad_left
from pema.owner.causal_lm import state_of
from pema.tasks.template import EncodedExample

if TYPE_CHECKING:
    from transformers import PreTrainedModel

RowInputs = Callable[[list[int], int], AbstractContextManager[object]]
"""Function of SL of each row of a pass, and of the number of columns of the prompts; it builds the context manager
around the pass, as `attached.inputs` does."""


Scores = tuple[Tensor, Tensor]
"""What `search` returns."""


@dataclass(frozen=True, eq=False)
class Part:
    """A batch of prompts to search labels for; see `search`.

    Attributes:
        sources: the places of its sources.
        tree: the labels.
        prompts: the prompts.
        width: see `search`.
        floor: see `search`.
    """

    sources: list[int]
    tree: LabelTree
    prompts: list[EncodedExample]
    width: int | None
    floor: Tensor | None


def search_part(model: PreTrainedModel, part: Part, inputs: RowInputs | None, every: bool) -> Scores:
    """Search labels for a batch; see `search`."""
    return search(model, part.tree, part.prompts, inputs, width=part.width, floor=part.floor, every=every)


@torch.no_grad()
def search(
    model: PreTrainedModel,
    tree: LabelTree,
    prompts: Sequence[EncodedExample],
    inputs: RowInputs | None,
    *,
    width: int | None = None,
    floor: Tensor | None = None,
    every: bool = True,
) -> Scores:
    """Compute log P(label | prompt) of the labels of a tree.

    The prompts are read once. The rows of a further pass are the beginnings of labels of one length, with the state of
    their parents.

    Args:
        model: the model, in its current state.
        tree: the labels.
        prompts: the prompts of one batch.
        inputs: see `RowInputs`.
        width: maximum number of beginnings per prompt and depth that are followed, the most probable ones.
        floor: (b,), beginnings that are less probable are not followed.
        every: whether to follow beginnings that are less probable than a label that has ended.

    Returns:
        (b, labels) float64, -inf for labels that were not followed to their end; and (b,) float64, the log probability
        of the most probable beginning that was left out because of `width`, -inf if there is none.
    """
    columns = max(len(prompt.prompt) for prompt in prompts)
    ids, mask = pad_left([prompt.prompt for prompt in prompts], columns)
    one = _Search(tree, [prompt.source_length for prompt in prompts], inputs, width, floor, every)
    model.generate(
        input_ids=ids.to(model.device),
        attention_mask=mask.to(model.device),
        generation_config=GenerationConfig(max_new_tokens=len(tree.levels), do_sample=False),
        custom_generate=one.run,
    )
    return one.scores, one.missed


class _Search:
    """One call of a model's `generate` that scores labels instead of choosing tokens.

    `generate` prepares what a model needs (its state, positions, the prefix of prefix-tuning) and calls `run`.
    """

    def __init__(
        self,
        tree: LabelTree,
        lengths: Sequence[int],
        inputs: RowInputs | None,
        width: int | None,
        floor: Tensor | None,
        every: bool,
    ) -> None:
        self._tree, self._inputs, self._width, self._every = tree, inputs, width, every
        self._lengths = torch.tensor(lengths)
        self._ends = torch.tensor([len(target) for target in tree.targets])
        count = len(lengths)
        self._floor = torch.full((count,), -torch.inf, dtype=torch.float64) if floor is None else floor
        self.scores = torch.zeros(count, len(tree.targets), dtype=torch.float64)
        self.missed = torch.full((count,), -torch.inf, dtype=torch.float64)

    def run(
        self,
        model: Any,  # noqa: ANN401
        input_ids: Tensor,
        logits_processor: Any,  # noqa: ANN401
        stopping_criteria: Any,  # noqa: ANN401
        generation_config: GenerationConfig,
        **arguments: Any,  # noqa: ANN401
    ) -> Tensor:
        """Score the labels; see `custom_generate` of transformers."""
        columns = input_ids.shape[1]
        # (b, m): the row of each prompt's node, -1 if it is not followed.
        rows = torch.arange(len(input_ids))[:, None]
        items, ids = torch.arange(len(input_ids)), input_ids
        for depth, level in enumerate(self._tree.levels):
            if depth:
                kept = self._followed(depth, level)
                items, nodes = kept.nonzero(as_tuple=True)
                parents, before = rows[items, level.parents[nodes]], len(ids)
                rows = torch.full(kept.shape, -1)
                rows[items, nodes] = torch.arange(len(items))
                if not len(items):
                    self.scores[:, self._ends > depth] = -torch.inf
                    break
                parents = parents.to(ids.device)
                arguments = _selected(arguments, parents, before)
                ids = torch.cat((ids[parents], level.tokens[nodes].to(ids)[:, None]), dim=1)
            given = model.prepare_inputs_for_generation(
                ids,
                next_sequence_length=1 if depth and state_of(arguments) is not None else None,
                is_first_iteration=not depth,
                **arguments,
            )
            with self._around(self._lengths[items].tolist(), columns):
                output = model(**given, return_dict=True)
            arguments = model._update_model_kwargs_for_generation(output, arguments, is_encoder_decoder=False)
            self._add(level, rows, output.logits[:, -1])
        return input_ids

    def _around(self, lengths: list[int], columns: int) -> AbstractContextManager[object]:
        return contextlib.nullcontext() if self._inputs is None else self._inputs(lengths, columns)

    def _add(self, level: Level, rows: Tensor, logits: Tensor) -> None:
        """Add the log probabilities of the labels' next tokens."""
        total = logits.float().logsumexp(-1).double()
        place = rows[:, level.nodes]
        row = place.clamp(min=0).to(logits.device)
        log_p = logits[row, level.next.to(logits.device)].double() - total[row]
        self.scores[:, level.labels] += log_p.cpu().masked_fill(place < 0, -torch.inf)

    def _followed(self, depth: int, level: Level) -> Tensor:
        """Return (b, m) bool: which nodes of a level are followed."""
        beginnings = torch.empty(len(self.scores), len(level.tokens), dtype=torch.float64)
        beginnings[:, level.nodes] = self.scores[:, level.labels]
        # A beginning of probability 0 is not followed: its labels keep the score -inf.
        kept = (beginnings > -torch.inf) & (beginnings >= self._floor[:, None])
        if not self._every and bool((self._ends <= depth).any()):
            kept &= beginnings >= self.scores[:, self._ends <= depth].amax(1, keepdim=True)
        if self._width is not None and self._width < beginnings.shape[1]:
            values = beginnings.masked_fill(~kept, -torch.inf)
            least = values.topk(self._width).values[:, -1:]
            left_out = values.masked_fill(values >= least, -torch.inf).amax(1)
            self.missed = torch.maximum(self.missed, left_out)
            kept &= values >= least
        return kept


def _selected(arguments: dict[str, Any], parents: Tensor, rows: int) -> dict[str, Any]:
    """Return the arguments of the model for the rows `parents` of a batch of `rows` rows."""
    state = state_of(arguments)
    if state is not None:
        # Layers with a recurrent state select rows only in reorder_cache.
        state.reorder_cache(parents)

    def of_parents(value: Any) -> Any:  # noqa: ANN401
        by_row = isinstance(value, Tensor) and value.ndim > 1 and len(value) == rows
        return value[parents] if by_row else value

    return {name: of_parents(value) for name, value in arguments.items()}
