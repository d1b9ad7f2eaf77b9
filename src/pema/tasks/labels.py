"""Labels to choose from."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from pema.errors import ConfigError
from pema.schema import require_texts, short
from pema.tasks.example import Example


def require_labels(labels: Sequence[str]) -> list[str]:
    """Return the labels to choose from as a list.

    Raises:
        ConfigError: there are none, or one is not a text, blank, or given twice.
    """
    require_texts("labels", labels)
    chosen = list(labels)
    if not chosen:
        raise ConfigError("there are no labels to choose from: give at least one.")
    for number, label in enumerate(chosen, 1):
        if not isinstance(label, str) or not label.strip():
            raise ConfigError(f"label {number} is {short(label)}: give a text that is not blank.")
    twice = next((label for label in dict.fromkeys(chosen) if chosen.count(label) > 1), None)
    if twice is not None:
        raise ConfigError(f"the label {short(twice)} is given {chosen.count(twice)} times: give each label once.")
    return chosen


def labels_of(examples: Iterable[Example]) -> tuple[str, ...]:
    """Return the different targets of examples, sorted."""
    return tuple(sorted({target for example in examples for target in example.references}))
