"""The shapes of rows: which columns contain the texts, and how a row becomes examples."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pema.errors import DataError
from pema.tasks.conversation import conversation, read_turns, replies
from pema.tasks.example import Example, Turn
from pema.tasks.values import Row, field_of, is_missing, kind_of, listed, text_of, texts_of

Names = Mapping[str, Sequence[str] | None]
"""The names of the classes of each field that contains class numbers."""

NAME_THEM = "name the columns of the texts (source_field, target_field)"


@dataclass(frozen=True)
class Shape:
    """A shape of rows.

    Attributes:
        name: for messages.
        needed: columns that every row has.
        optional: columns that a row may have, and that are read then.
        read: converts a row, given its place and the names of classes.
        one_of: columns of which every row has at least one.
    """

    name: str
    needed: tuple[str, ...]
    read: Callable[[Row, str, Names], Iterable[Example]]
    optional: tuple[str, ...] = ()
    one_of: tuple[str, ...] = ()

    @property
    def columns(self) -> tuple[str, ...]:
        """All columns that are read."""
        return (*self.needed, *self.one_of, *self.optional)

    def fits(self, columns: Collection[str]) -> bool:
        """Return whether rows with these columns have this shape."""
        one = not self.one_of or any(column in columns for column in self.one_of)
        return one and all(column in columns for column in self.needed)


def _pair(row: Row, where: str, names: Names) -> Iterable[Example]:
    source = text_of(row["source"], "source", where, names.get("source"))
    target = text_of(row["target"], "target", where, names.get("target"))
    return (Example(source, target, where, _history(row, where)),)


def _several(row: Row, where: str, names: Names) -> Iterable[Example]:
    source = text_of(row["source"], "source", where, names.get("source"))
    target, *others = texts_of(row["targets"], "targets", where)
    return (Example(source, target, where, _history(row, where), tuple(others)),)


def _completion(row: Row, where: str, names: Names) -> Iterable[Example]:
    if isinstance(row["prompt"], str) or is_missing(row["prompt"]):
        source, target = (text_of(row[field], field, where, names.get(field)) for field in ("prompt", "completion"))
        return (Example(source, target, where),)
    before, _ = read_turns(row, "prompt", where)
    after, learned = read_turns(row, "completion", where)
    return replies([*before, *after], [*[False] * len(before), *learned], where)


def _instruction(row: Row, where: str, names: Names) -> Iterable[Example]:
    given = [field for field in ("instruction", "input") if not is_missing(row.get(field)) and row[field] != ""]
    if not given:
        raise DataError(f"{where}: 'instruction' and 'input' are both empty. Remove the row or fill one in.")
    source = "\n\n".join(text_of(row[field], field, where, names.get(field)) for field in given)
    return (Example(source, text_of(row["output"], "output", where, names.get("output")), where),)


def _history(row: Row, where: str) -> tuple[Turn, ...]:
    if is_missing(row.get("history")):
        return ()
    return tuple(read_turns(row, "history", where)[0])


def _messages(row: Row, where: str, names: Names) -> Iterable[Example]:
    return conversation(row, "messages", where)


def _conversations(row: Row, where: str, names: Names) -> Iterable[Example]:
    return conversation(row, "conversations", where)


BESIDE = ("system", "tools", "functions", "images", "image", "videos", "audios")
"""Columns that matter beside the turns of a conversation."""

SHAPES = (
    Shape("source and target", ("source", "target"), _pair, ("history",)),
    Shape("source and targets", ("source", "targets"), _several, ("history",)),
    Shape("prompt and completion", ("prompt", "completion"), _completion),
    Shape("instruction, input and output", ("output",), _instruction, one_of=("instruction", "input")),
    Shape("messages", ("messages",), _messages, BESIDE),
    Shape("conversations", ("conversations",), _conversations, BESIDE),
)
"""The shapes that are recognised by their columns."""


def named(source_field: str, target_field: str) -> Shape:
    """Return the shape of rows whose columns the caller named; the target may be a list of valid targets."""

    def read(row: Row, where: str, names: Names) -> Iterable[Example]:
        source = text_of(field_of(row, source_field, where), source_field, where, names.get(source_field))
        value = field_of(row, target_field, where)
        if isinstance(value, list | tuple) and value and all(isinstance(each, str) for each in value):
            target, *others = texts_of(value, target_field, where)
            return (Example(source, target, where, alternatives=tuple(others)),)
        return (Example(source, text_of(value, target_field, where, names.get(target_field)), where),)

    return Shape(f"{source_field} and {target_field}", (source_field, target_field), read)


def _target_alone(row: Row, where: str, names: Names) -> Iterable[Example]:
    return (Example("", text_of(row["target"], "target", where, names.get("target"))),)


def _targets_alone(row: Row, where: str, names: Names) -> Iterable[Example]:
    target, *others = texts_of(row["targets"], "targets", where)
    return (Example("", target, alternatives=tuple(others)),)


REFERENCES = (
    Shape("target", ("target",), _target_alone),
    Shape("targets", ("targets",), _targets_alone),
    *SHAPES[2:],
)
"""The shapes of rows of which only the targets are read: a source is not needed."""


def _source_alone(row: Row, where: str, names: Names) -> Iterable[Example]:
    return (Example(text_of(row["source"], "source", where, names.get("source")), "", where, _history(row, where)),)


SOURCES = (Shape("source", ("source",), _source_alone, ("history",)), *SHAPES[2:])
"""The shapes of rows of which only the sources are read: most need no target."""


class Converter:
    """Conversion of rows into examples, one shape for all rows.

    Attributes:
        shape: the shape of the rows; None until it is known.
    """

    def __init__(self, shape: Shape | None, names: Names, shapes: Sequence[Shape] = SHAPES) -> None:
        """Set how rows are read.

        Args:
            shape: their shape; None recognises it by the columns of each row.
            names: see `Names`.
            shapes: the shapes that are recognised.
        """
        self.shape = shape
        self._chosen = shape is not None
        self._names, self._shapes = names, shapes

    def examples(self, rows: Iterable[tuple[str, Any]]) -> Iterator[Example]:
        """Yield the examples of rows, each given with its place.

        Raises:
            DataError: a row is not a mapping, has no shape or another one than the rows before; the message names it.
        """
        shape, names = self.shape, self._names
        columns: Collection[str] = ()
        for where, row in rows:
            if not isinstance(row, dict) and not isinstance(row, Mapping):
                raise DataError(f"{where} is {kind_of(row)}, not an object with texts by their names (source, target).")
            if shape is None or (not self._chosen and row.keys() != columns):
                shape, columns = self._same(row.keys(), where), row.keys()
            yield from shape.read(row, where, names)

    def _same(self, columns: Collection[str], where: str) -> Shape:
        current = recognise(columns, where, self._shapes)
        if self.shape is not None and current is not self.shape:
            raise DataError(
                f"{where}: the row contains {current.name}, but the rows before contain {self.shape.name}: write all "
                "rows in one way, or split the file."
            )
        self.shape = current
        return current


def recognise(columns: Collection[str], where: str, shapes: Sequence[Shape] = SHAPES) -> Shape:
    """Return the shape of rows with these columns.

    Raises:
        DataError: the columns have no shape, or more than one.
    """
    fitting = [shape for shape in shapes if shape.fits(columns)]
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        names = " as well as ".join(shape.name for shape in fitting)
        raise DataError(f"{where}: {names} are both there: {NAME_THEM}, or remove those that are not meant.")
    known = "; ".join(shape.name for shape in shapes)
    raise DataError(
        f"{where}: the texts are not recognised: the columns are {listed(columns)}, known are {known}. Rename them, or "
        f"{NAME_THEM}."
    )
