"""Access to any causal LM of transformers: its output embedding, and the state between two calls."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from pema.errors import OwnerError

STATE_NAMES = ("cache", "past_key_values", "cache_params")
"""Names of the state in transformers, newest first: an argument of `forward` and a field of its output."""

OUTPUT_NAME = next(name for name in STATE_NAMES if name in CausalLMOutputWithPast.__dataclass_fields__)
"""The field of `CausalLMOutputWithPast` that holds the state."""


def state_argument(model: nn.Module) -> str | None:
    """Return the argument of the model's `forward` that takes the state; None for a model without state."""
    arguments = inspect.signature(model.forward).parameters
    return next((name for name in STATE_NAMES if name in arguments), None)


def state_of(values: Mapping[str, Any]) -> Any:  # noqa: ANN401
    """Return the state from the arguments of a call or from a model's output; None if there is none.

    Only names present in the output are read, because access to an older name raises a deprecation warning.
    """
    present = set(values)
    return next((values[name] for name in STATE_NAMES if name in present and values[name] is not None), None)


def output_embedding(model: PreTrainedModel) -> nn.Module:
    """Return the module whose input is the head input.

    Raises:
        OwnerError: the model has none.
    """
    try:
        embedding = model.get_output_embeddings()
    except (AttributeError, NotImplementedError):
        embedding = None
    if not isinstance(embedding, nn.Module):
        raise OwnerError(
            f"{type(model).__name__} is not supported: it has no output embedding, so it is not a causal language "
            "model."
        )
    return embedding
