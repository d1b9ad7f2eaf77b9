"""Number of positions of each sequence that grows pass by pass, identified by the model's state (its cache)."""

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
    """The sequence of one state.

    Attributes:
        columns: number of positions that the model has run; None where it is unknown.
        prompt: number of them that belong to the prompt; None where they ran before the adapter was attached.
        lengths: (items,) tokens of the prompts without padding; None where they were not needed.
        weights: the weights of the latest pass.
        block: the `inputs` block in which the weights are valid.
        reported: the length that the state itself reports; None where it reports none.
    """

    columns: int | None
    prompt: int | None
    lengths: Tensor | None = None
    weights: Weights | None = None
    block: Inputs | None = None
    reported: int | None = None

    @property
    def tells(self) -> bool:
        """Return whether the state reports its true length, so that its report is valid after a crop or a reset."""
        return self.reported == self.columns


class Sequences:
    """Counter of the positions of each state, because not every state reports how many it holds.

    A state is an object that the model changes in place and returns. A state with attention reports its length, which
    decreases when it is cropped; a state of linear attention or Mamba does not.
    """

    def __init__(self) -> None:
        self._known: weakref.WeakKeyDictionary[Any, Sequence] = weakref.WeakKeyDictionary()
        self._lock = threading.Lock()

    def before(self, state: object) -> Sequence | None:
        """Return the sequence that a pass with `state` continues, or None where the pass starts a new one.

        Raises:
            OwnerError: the object cannot be identified as a state, or a state that does not report its length was
                changed outside the model.
        """
        if state is None:
            return None
        sequence, length = self._get(state), reported_length(state)
        if sequence is None:
            return Sequence(length or None, None, reported=length or None) if length or _is_filled(state) else None
        if sequence.tells:
            return replace(sequence, columns=length, reported=length) if length else None
        if length != sequence.reported:
            raise OwnerError(
                f"a cache of type {type(state).__name__} was changed outside the model, and does not report its "
                "length: start again with a new cache."
            )
        return sequence if _is_filled(state) else None

    def count(self, state: object, sequence: Sequence) -> None:
        """Record the current sequence of `state`."""
        sequence = replace(sequence, reported=reported_length(state))
        with self._lock:
            self._known[state] = sequence

    def forget(self, state: object) -> None:
        """Drop the record of `state`, because other code continues from it."""
        with self._lock:
            self._known.pop(state, None)

    def _get(self, state: object) -> Sequence | None:
        try:
            with self._lock:
                return self._known.get(state)
        except TypeError:
            raise OwnerError(
                f"a cache of type {type(state).__name__} does not report its length: use a DynamicCache."
            ) from None


def reported_length(state: object) -> int | None:
    """Return the number of positions that a state reports, the maximum over its layers; None where it reports none."""
    layers = getattr(state, "layers", None) or [state]
    lengths = [int(layer.get_seq_length()) for layer in layers if hasattr(layer, "get_seq_length")]
    return max(lengths, default=None)


def _is_filled(state: object) -> bool:
    """Return whether a state that does not report its length holds anything."""
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
