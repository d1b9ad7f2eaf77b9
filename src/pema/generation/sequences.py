"""Sequences that grow pass by pass, known by the state that the model hands on: how many positions each one has."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from pema.errors import OwnerError
from pema.generation.calls import Inputs
from pema.generation.steps import Weights


@dataclass(frozen=True)
class Sequence:
    """What one state stands for.

    Attributes:
        columns: positions that the model has run; None where neither we nor the state can say.
        prompt: positions among them that were the prompt; None where they ran before the adapter was attached.
        lengths: (items,) tokens of the prompts without padding; None where they were not asked for.
        weights: those of the latest pass.
        block: the `inputs` block that they hold in.
        said: what the state itself says of its length; None for one that does not say.
    """

    columns: int | None
    prompt: int | None
    lengths: Tensor | None = None
    weights: Weights | None = None
    block: Inputs | None = None
    said: int | None = None

    @property
    def tells(self) -> bool:
        """Whether what the state says is true, so that it may be believed where it was cropped or reset."""
        return self.said == self.columns


class Sequences:
    """Counts the positions of each state, since not every state says how many it holds.

    A state is an object that the model changes in place and returns. A state with attention says its length, which goes
    back where it is cropped; one of linear attention or Mamba does not.
    """

    def __init__(self) -> None:
        self._known: weakref.WeakKeyDictionary[Any, Sequence] = weakref.WeakKeyDictionary()
        self._lock = threading.Lock()

    def before(self, state: object) -> Sequence | None:
        """The sequence that a pass with `state` goes on from; None where it begins a new one.

        Raises:
            OwnerError: the object is no state that can be told from another, or one that does not say its length was
                changed outside the model.
        """
        if state is None:
            return None
        sequence, said = self._get(state), length_said(state)
        if sequence is None:
            return Sequence(said or None, None, said=said or None) if said or _is_filled(state) else None
        if sequence.tells:
            return replace(sequence, columns=said, said=said) if said else None
        if said != sequence.said:
            raise OwnerError(
                f"A cache of type {type(state).__name__} was changed outside the model, and does not say its length: "
                "begin again with a new one."
            )
        return sequence if _is_filled(state) else None

    def count(self, state: object, sequence: Sequence) -> None:
        """Note what `state` stands for now."""
        sequence = replace(sequence, said=length_said(state))
        with self._lock:
            self._known[state] = sequence

    def forget(self, state: object) -> None:
        """Something else goes on from `state`."""
        with self._lock:
            self._known.pop(state, None)

    def _get(self, state: object) -> Sequence | None:
        try:
            with self._lock:
                return self._known.get(state)
        except TypeError:
            raise OwnerError(
                f"A cache of type {type(state).__name__} does not say its length: use a DynamicCache."
            ) from None


def length_said(state: object) -> int | None:
    """Positions that a state says it holds, by the longest of its layers; None for one that does not say."""
    layers = getattr(state, "layers", None) or [state]
    lengths = [int(layer.get_seq_length()) for layer in layers if hasattr(layer, "get_seq_length")]
    return max(lengths, default=None)


def _is_filled(state: object) -> bool:
    """Whether a state that does not say its length holds anything."""
    holders = [state, *(layer for layer in getattr(state, "layers", []) if not hasattr(layer, "get_seq_length"))]
    return any(bool(tensor.any()) for holder in holders for tensor in _tensors(getattr(holder, "__dict__", {})))


def _tensors(value: object) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for part in value.values():
            yield from _tensors(part)
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _tensors(part)
