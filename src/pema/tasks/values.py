"""Texts in the rows of a data set: fields, which may be nested, and values, which become texts."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from pema.errors import DataError

Row = Mapping[str, Any]

FILL = "Remove the row or fill it in."


def field_of(row: Row, field: str, where: str) -> Any:  # noqa: ANN401 - a value of any type
    """Return the value of a field; dots select nested values, unless the whole name is a field.

    Raises:
        DataError: there is no such field; the message lists the fields of the row.
    """
    if field in row:
        return row[field]
    value: Any = row
    for part in field.split("."):
        if isinstance(value, Mapping) and part in value:
            value = value[part]
        elif isinstance(value, list) and part.isdecimal() and int(part) < len(value):
            value = value[int(part)]
        else:
            raise DataError(f"{where}: no field {field!r}; the row contains {listed(row)}. Name one of them.")
    return value


def text_of(value: object, field: str, where: str, names: Sequence[str] | None = None) -> str:
    """Convert the value of a field to a text: numbers (often labels) to their digits, classes to their names.

    Args:
        value: the value.
        field: its field, for the message.
        where: its row, for the message.
        names: the names of the classes, if the field contains class numbers.

    Raises:
        DataError: the value is missing, blank or not a text, or the class has no name.
    """
    if type(value) is not str:
        value = _converted(value, field, where, names)
    if not value or value.isspace():
        raise DataError(f"{where}: {field!r} is blank. {FILL}")
    if not value.isascii():
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            raise DataError(
                f"{where}: {field!r} contains half of a surrogate pair at character {error.start + 1}. {FILL}"
            ) from error
    return value


def texts_of(value: object, field: str, where: str) -> tuple[str, ...]:
    """Convert a list of values to texts: the valid targets of one source.

    Raises:
        DataError: it is not a list, it is empty, or a value is no text.
    """
    value = _plain(value)
    if not isinstance(value, list | tuple):
        raise DataError(f"{where}: {field!r} is {kind_of(value)}, not a list of texts.")
    if not value:
        raise DataError(f"{where}: {field!r} is an empty list. {FILL}")
    return tuple(text_of(each, f"{field}.{i}", where) for i, each in enumerate(value))


def is_missing(value: object) -> bool:
    """Return whether a value is null: None, NaN, or what pandas writes instead."""
    return value is None or (isinstance(value, float) and math.isnan(value)) or type(value).__name__ == "NAType"


def kind_of(value: object) -> str:
    """Describe a value that is not a text, for a message."""
    if isinstance(value, float):
        return str(value)
    if isinstance(value, Mapping):
        return f"a {type(value).__name__} ({listed(value)})"
    name = type(value).__name__
    return f"{'an' if name[:1] in 'aeiouAEIOU' else 'a'} {name}"


def listed(names: Iterable[Any]) -> str:
    """List names for a message."""
    return ", ".join(repr(name) for name in names) or "nothing"


def _converted(value: object, field: str, where: str, names: Sequence[str] | None) -> str:
    if is_missing(value):
        raise DataError(f"{where}: {field!r} is missing ({value}). {FILL}")
    value = _plain(value)
    if isinstance(value, str):
        return str(value)
    if isinstance(value, int) and not isinstance(value, bool) and names is not None:
        if not 0 <= value < len(names):
            raise DataError(
                f"{where}: {field!r} is class {value}, which has no name (only 0 to {len(names) - 1} do): give a split "
                "of the data set that has labels."
            )
        return str(names[value])
    if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        return str(value)
    raise DataError(f"{where}: {field!r} is {kind_of(value)}, not a text.")


def _plain(value: object) -> object:
    """Convert the scalars and arrays of numpy and torch to Python's numbers and lists."""
    return value.tolist() if hasattr(value, "tolist") else value
