"""What is asked of any causal LM of transformers: its output embedding, and the state between two calls."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from pema.errors import OwnerError

STATE_NAMES = ("cache", "past_key_values", "cache_params")
"""The names of the state in transformers, newest first: an argument of `forward` and a field of its output."""

OUTPUT_NAME = next(name for name in STATE_NAMES if name in CausalLMOutputWithPast.__dataclass_fields__)
"""The field of `CausalLMOutputWithPast` that holds the state."""


def state_argument(model: nn.Module) -> str | None:
    """The argument of the model's `forward` that takes the state; None for a model that keeps none."""
    arguments = inspect.signature(model.forward).parameters
    return next((name for name in STATE_NAMES if name in arguments), None)


def state_of(values: Mapping[str, Any]) -> Any:  # noqa: ANN401
    """The state among the arguments of a call or in a model's output; None where there is none.

    Only what an output holds is read: asking it for one of the older names warns of their deprecation.
    """
    held = set(values)
    return next((values[name] for name in STATE_NAMES if name in held and values[name] is not None), None)


def output_embedding(model: PreTrainedModel) -> nn.Module:
    """The module whose input is the head input.

    Raises:
        OwnerError: the model has none.
    """
    try:
        embedding = model.get_output_embeddings()
    except (AttributeError, NotImplementedError):
        embedding = None
    if not isinstance(embedding, nn.Module):
        raise OwnerError(
            f"{type(model).__name__} is not understood: it has no output embedding, so it is no causal language model."
        )
    return embedding
