"""Labels as token sequences after a prompt, and the tree of their common beginnings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pema.errors import ConfigError
from pema.schema import short
from pema.tasks.example import Example

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from pema.tasks.template import EncodedExample, Template

BEFORE = 2
"""Number of tokens at the end of a prompt that decide the tokens of a label after it.

No token spans the end of the prompt, so a tokenizer splits the label in the same way after all prompts with these last
tokens: its rules for what follows read the adjacent characters only.
"""


@dataclass(frozen=True)
class Level:
    """The nodes of a tree at one depth: the different beginnings, of this many tokens, that some label continues.

    Attributes:
        parents: (m,) int64, the node of the previous level that each node continues.
        tokens: (m,) int64, the last token of each node.
        labels: (k,) int64, the labels that are longer than the beginning.
        nodes: (k,) int64, the node of each of these labels.
        next: (k,) int64, the next token of each of these labels.
    """

    parents: Tensor
    tokens: Tensor
    labels: Tensor
    nodes: Tensor
    next: Tensor


class LabelTree:
    """The labels as paths from the prompt to an end: labels with a common beginning share its nodes.

    Attributes:
        targets: the tokens of each label, with the token that ends it.
        levels: the nodes by depth; the first level is the prompt.
    """

    def __init__(self, targets: Sequence[tuple[int, ...]]) -> None:
        self.targets = tuple(targets)
        places: dict[tuple[int, ...], int] = {(): 0}
        self.levels: list[Level] = []
        for depth in range(max(map(len, targets))):
            longer = [i for i, target in enumerate(targets) if len(target) > depth]
            level = {target: place for place, target in enumerate(dict.fromkeys(targets[i][:depth] for i in longer))}
            columns = (
                [places[node[:-1]] for node in level],
                [node[-1] if node else 0 for node in level],
                longer,
                [level[targets[i][:depth]] for i in longer],
                [targets[i][depth] for i in longer],
            )
            self.levels.append(Level(*(torch.tensor(column, dtype=torch.int64) for column in columns)))
            places = level

    @cached_property
    def widest(self) -> int:
        """Number of nodes of the widest level."""
        return max(len(level.tokens) for level in self.levels)


def label_trees(
    template: Template,
    tokenizer: PreTrainedTokenizerBase,
    sources: Sequence[str | Example],
    prompts: Sequence[EncodedExample],
    labels: Sequence[str],
) -> list[LabelTree]:
    """Return the tree of the labels after each prompt; prompts after which labels have the same tokens share it.

    A label's tokens are those of a target after the prompt, and of the token that ends it. Every label follows the
    prompt's own tokens, as a generated text does: see `apart` of `Template.encode`.

    Raises:
        ConfigError: two labels have the same tokens.
        DataError: a label cannot be a target; the message names it.
    """
    trees: dict[tuple[int, ...], LabelTree] = {}
    same: dict[tuple[tuple[int, ...], ...], LabelTree] = {}
    after = []
    for source, prompt in zip(sources, prompts, strict=True):
        end = prompt.prompt[-BEFORE:]
        if end not in trees:
            example = source if isinstance(source, Example) else Example(source, "")
            targets = [replace(example, target=label, where=f"label {short(label)}") for label in labels]
            encoded = tuple(each.target for each in template.encode(tokenizer, targets, apart=True))
            if encoded not in same:
                _require_different(encoded, labels)
                same[encoded] = LabelTree(encoded)
            trees[end] = same[encoded]
        after.append(trees[end])
    return after


def _require_different(targets: Sequence[tuple[int, ...]], labels: Sequence[str]) -> None:
    first: dict[tuple[int, ...], str] = {}
    for target, label in zip(targets, labels, strict=True):
        other = first.setdefault(target, label)
        if other != label:
            raise ConfigError(
                f"the labels {short(other)} and {short(label)} have the same tokens, so the PLM cannot tell "
                "them apart: remove one of them."
            )
