"""What the files of a result folder hold, field by field, and how a file is held to it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pema.errors import DataError

NUMBER = ((int, float), "a number")
NUMBER_OR_NULL = ((int, float, type(None)), "a number or null")
TEXT = ((str,), "text")
TEXT_OR_NULL = ((str, type(None)), "text or null")
LIST = ((list,), "a list")
OBJECT = ((dict,), "an object")
BOOLEAN = ((bool,), "true or false")
ANYTHING = ((object,), "anything")

Kind = tuple[tuple[type, ...], str]
SIGNATURE: dict[str, Kind] = {
    "signature.config": OBJECT,
    "signature.seed": ANYTHING,
    "signature.versions": OBJECT,
    "signature.commit": ANYTHING,
    "signature.machine": OBJECT,
}
FIELDS_OF_EXPERIMENT: dict[str, Kind] = {
    **dict.fromkeys(("name", "title", "kind", "task", "data.name", "data.sha256", "plm.name"), TEXT),
    "reference": TEXT_OR_NULL,
    **dict.fromkeys(("data.train", "data.dev", "data.test", "plm.d", "plm.vocabulary_size", "plm.parameters"), NUMBER),
    **dict.fromkeys(("seeds", "metrics", "methods"), LIST),
    **SIGNATURE,
}
FIELDS_OF_INTERVAL: dict[str, Kind] = {"mean": NUMBER, "std": NUMBER_OR_NULL, "low": NUMBER, "high": NUMBER}
FIELDS_OF_DIFFERENCE: dict[str, Kind] = {
    **dict.fromkeys(("label", "reference", "metric"), TEXT),
    **dict.fromkeys(("difference", "low", "high", "p_value"), NUMBER),
    "significant": BOOLEAN,
}
COSTS = (
    "trainable_parameters",
    "prepare_seconds",
    "train_seconds",
    "train_peak_bytes",
    "seconds_per_token",
    "generated_tokens",
    "disk_bytes",
)
ACCELERATOR = "train_peak_accelerator_bytes"
"""A cost that only runs on an accelerator have."""
FIELDS_OF_RUN: dict[str, Kind] = {
    **dict.fromkeys(("run", "label", "method", "needs.weights"), TEXT),
    "settings": OBJECT,
    "seed": NUMBER,
    "scores": OBJECT,
    "dev_perplexity": NUMBER_OR_NULL,
    "trials": LIST,
    **{f"costs.{name}": NUMBER_OR_NULL for name in COSTS},
    "needs.targets_at_owner": BOOLEAN,
    "needs.gradients": BOOLEAN,
    "curve": LIST,
    **SIGNATURE,
}
FIELDS_OF_POINT: dict[str, Kind] = {"epoch": NUMBER, "seconds": NUMBER, "held_out_loss": NUMBER}


def require(value: Any, path: Path, fields: Mapping[str, Kind], where: str = "", remedy: str = "") -> dict[str, Any]:  # noqa: ANN401
    """Hold a JSON object to its fields.

    Args:
        value: what should be the object.
        path: the file that it is from.
        fields: the kind of each; a dot stands between the names of nested ones.
        where: what the object is in the file.
        remedy: a sentence for the message.

    Raises:
        DataError: it is no object, a field is missing, or it is of another kind; the message names all three.
    """
    within = f"{where} " if where else ""
    remedy = remedy or "It is damaged or of an older version: make the results again."
    if not isinstance(value, dict):
        raise DataError(f"{path}: {where} is {short(value)}, not an object. {remedy}")
    for field, (types, kind) in fields.items():
        found: Any = value
        for name in field.split("."):
            if not isinstance(found, dict) or name not in found:
                raise DataError(f"{path}: {within}has no field {field!r}. {remedy}")
            found = found[name]
        if not isinstance(found, types) or (isinstance(found, bool) and bool not in types and object not in types):
            raise DataError(f"{path}: {within}has {short(found)} as {field!r}, not {kind}. {remedy}")
    return value


def short(value: object) -> str:
    """Write a value for a message, its beginning where it is long."""
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
