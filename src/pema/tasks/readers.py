"""Examples from what users have: files, data frames, Hugging Face data sets, and any iterable of rows.

Text is UTF-8, with or without a byte-order mark, plain or compressed by gzip, bzip2, xz or zstd. A line ends at a line
feed, or at a carriage return and a line feed, and nowhere else: U+2028 and similar characters are part of the text.
Which columns contain the texts is recognised (`pema.tasks.shapes`), or named by the caller.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice, zip_longest
from pathlib import Path
from typing import Any

from pema.errors import ConfigError, DataError
from pema.schema import require
from pema.tasks.example import Example
from pema.tasks.frames import HUB, folder_table, hub_table, parquet_table, table_of
from pema.tasks.lines import COMPRESSED, MAGIC, decode, opened, raw_lines, stem, text_lines
from pema.tasks.rows import Table, csv_table, json_table, tsv_table
from pema.tasks.shapes import REFERENCES, SHAPES, SOURCES, Converter, Shape, named, recognise
from pema.tasks.values import listed, text_of

JSON = (".jsonl", ".ndjson", ".json")
TSV = (".tsv", ".tab")
CSV = ".csv"
PARQUET = ".parquet"

NAME_OTHERS = "Name the columns of the texts (source_field, target_field)."


@dataclass(frozen=True)
class Reading:
    """Examples, and what was read.

    Attributes:
        examples: the examples, in the order of the data.
        name: the file, or what else was read.
        shape: the columns of the texts.
    """

    examples: list[Example]
    name: str
    shape: str

    def __str__(self) -> str:
        references = sum(len(example.references) for example in self.examples)
        targets = f" with {references:,} targets" if references > len(self.examples) else ""
        return f"{self.name}: {len(self.examples):,} examples{targets} ({self.shape})"


def read_examples(
    data: object = None,
    *,
    source: str | os.PathLike[str] | None = None,
    target: str | os.PathLike[str] | None = None,
    source_field: str | None = None,
    target_field: str | None = None,
    limit: int | None = None,
) -> list[Example]:
    """Read the examples of one data set.

    Args:
        data: a file: JSONL, a JSON list of objects, CSV, TSV or Parquet (`.jsonl`, `.ndjson`, `.json`, `.csv`, `.tsv`,
            `.tab`; `.gz`, `.bz2`, `.xz` or `.zst` may follow); a folder written by `Dataset.save_to_disk`;
            `hf:NAME:SPLIT` or `hf:NAME:CONFIG:SPLIT` on the Hugging Face Hub; a data frame (pandas, polars, Arrow); a
            data set of Hugging Face, streaming or not; or any iterable of mappings. What can be read only once is read
            once, and only as far as `limit` needs.
        source: a text file with one source per line; with `target`, instead of `data`.
        target: a text file with one target per line, aligned with `source`.
        source_field: the column of `data` that contains the source, where it is not recognised (docs/data.md). Dots
            select nested values (`translation.en`, `answers.text.0`). In a CSV or TSV file also a column number,
            counted from 1; then the first line is a row, too.
        target_field: the same for the target; a list of texts there gives several valid targets of one source.
        limit: the number of examples to read; default: all.

    Raises:
        DataError: a file is missing, empty, misaligned or malformed, or a row is; the message names file and line, or
            the row, counted from 0.
        ConfigError: the arguments name no data set or more than one, or a package that reads it is not installed.
    """
    return read(
        data, source=source, target=target, source_field=source_field, target_field=target_field, limit=limit
    ).examples


def read(
    data: object = None,
    *,
    source: str | os.PathLike[str] | None = None,
    target: str | os.PathLike[str] | None = None,
    source_field: str | None = None,
    target_field: str | None = None,
    limit: int | None = None,
) -> Reading:
    """Read the examples of one data set, and say what was read; see `read_examples`."""
    require("limit", limit, int | None)
    if limit is not None and limit < 1:
        raise ConfigError(f"limit {limit} leaves no example: give 1 or more, or None for all.")
    if data is not None:
        if source is not None or target is not None:
            raise ConfigError("give either data (with both texts) or source and target (two text files), not both.")
        fields = None
        require("source_field", source_field, str | None)
        require("target_field", target_field, str | None)
        if source_field is not None or target_field is not None:
            fields = (source_field or "source", target_field or "target")
        return _read_table(_table(data, fields), fields, limit)
    if source is None or target is None:
        raise ConfigError("no data: give source and target (two aligned text files), or data (one file with both).")
    return _read_parallel(Path(source), Path(target), limit)


def from_dataset(data: object, source_field: str, target_field: str, limit: int | None = None) -> list[Example]:
    """Read the examples of rows whose columns are named; `read_examples` by its former name."""
    return read_examples(data, source_field=source_field, target_field=target_field, limit=limit)


def read_lines(path: str | os.PathLike[str]) -> list[str]:
    """Read the lines of a text file without line ends; blank lines are kept.

    Raises:
        DataError: the file is missing, empty or not UTF-8.
    """
    return [line for _, line in text_lines(Path(path))]


def read_sources(data: object, source_field: str | None = None) -> list[Example]:
    """Read what texts are generated from, with their histories: rows as for `read_examples`, which need no target.

    Raises:
        DataError, ConfigError: see `read_examples`.
    """
    fields = None if source_field is None else (source_field, source_field)
    return _read_table(_table(data, fields), fields, None, SOURCES).examples


def read_references(path: str | os.PathLike[str], target_field: str | None = None) -> list[tuple[str, ...]]:
    """Read the valid targets of each source: from a text file with one per line, or from rows as `read_examples` does.

    Rows with `target` or `targets` need no source.

    Args:
        path: the file.
        target_field: the column of the targets, where it is not recognised.

    Raises:
        DataError: see `read_examples`.
        ConfigError: a column of a text file with one target per line.
    """
    path = Path(path)
    if not _has_rows(path):
        if target_field is not None:
            raise ConfigError(
                f"target_field={target_field!r} names a column, and {path} has one text per line: leave it out."
            )
        return [(line,) for line in read_lines(path)]
    if target_field is not None:
        fields = (target_field, target_field)
        return [example.references for example in _read_table(_file_table(path, fields), fields, None).examples]
    converter = Converter(None, {}, REFERENCES)
    examples = converter.examples(_file_table(path, None).read(None))
    return [example.references for example in _some(list(examples), path)]


def _table(data: object, fields: tuple[str, str] | None) -> Table:
    if not isinstance(data, str | os.PathLike):
        return table_of(data)
    if isinstance(data, str) and data.startswith(HUB):
        return hub_table(data)
    path = Path(data)
    return folder_table(path) if path.is_dir() else _file_table(path, fields)


def _has_rows(path: Path) -> bool:
    """Return whether a file contains rows with several texts, rather than one text per line."""
    return stem(path).endswith((*JSON, CSV, *TSV, PARQUET)) or _is_parquet(path)


def _is_parquet(path: Path) -> bool:
    with opened(path) as file:
        return file.read(len(MAGIC)) == MAGIC


def _file_table(path: Path, fields: tuple[str, str] | None) -> Table:
    if _is_parquet(path):
        return parquet_table(path)
    name = stem(path)
    if name.endswith(JSON):
        return json_table(path)
    if name.endswith(TSV):
        return tsv_table(path, fields)
    if name.endswith(CSV):
        return csv_table(path, fields)
    next(raw_lines(path))
    if name.endswith(PARQUET):
        raise DataError(f"{path} is not a Parquet file, whatever its name: it does not begin with PAR1.")
    known = ", ".join((*JSON, CSV, *TSV, PARQUET))
    raise DataError(
        f"{path}: cannot tell the format from the name: name it {known} ({', '.join(COMPRESSED)} may follow). If it "
        "contains one text per line, give two such files, as source and target."
    )


def _read_table(
    table: Table, fields: tuple[str, str] | None, limit: int | None, shapes: Sequence[Shape] = SHAPES
) -> Reading:
    shape = None if fields is None else named(*fields)
    columns = table.columns
    if columns is not None:
        twice = {column for column in columns if column and columns.count(column) > 1}
        if twice:
            raise DataError(f"{table.name}: two columns are called {min(twice)!r}: rename one.")
        if shape is None:
            shape = recognise(columns, table.name, shapes)
        top = {field if field in columns else field.partition(".")[0] for field in shape.columns}
        for field in shape.needed:
            if field not in columns and field.partition(".")[0] not in columns:
                raise DataError(f"{table.name}: no column {field!r}: the columns are {listed(columns)}. {NAME_OTHERS}")
        columns = tuple(column for column in columns if column in top)
    fields_read = {column for each in (shapes if shape is None else (shape,)) for column in each.columns}
    names = {field: _class_names(table.features, field) for field in fields_read}
    converter = Converter(shape, names, shapes)
    examples = _some(list(islice(converter.examples(table.read(columns)), limit)), table.name)
    name = "" if converter.shape is None else converter.shape.name
    return Reading(examples, table.name, f"columns {name}, from the first line on" if table.numbered else name)


def _class_names(features: Any, field: str) -> Sequence[str] | None:  # noqa: ANN401 - features of an optional package
    """Return the class names of a field of class labels, else None; see `field_of` for nested fields."""
    feature = features
    for part in [field] if isinstance(features, Mapping) and field in features else field.split("."):
        inner = getattr(feature, "feature", None)  # of a list
        feature = feature.get(part) if isinstance(feature, Mapping) else inner if part.isdecimal() else None
    return feature.names if hasattr(feature, "int2str") else None


def _read_parallel(source: Path, target: Path, limit: int | None) -> Reading:
    examples: list[Example] = []
    pairs = zip_longest(raw_lines(source), raw_lines(target))
    for number, (left, right) in enumerate(pairs, start=1):
        if left is None or right is None:
            longer = target if left is None else source
            rest = number + sum(1 for _ in pairs)
            counts = (number - 1, rest) if left is None else (rest, number - 1)
            raise DataError(
                f"{source} and {target} are not aligned: {counts[0]} and {counts[1]} lines; {longer}:{number} has no "
                "partner. Give files with one source and one target per line."
            )
        if limit is None or number <= limit:
            where = f"{source}:{number}"
            one = text_of(decode(left, source, number), "source", where)
            other = text_of(decode(right, target, number), "target", f"{target}:{number}")
            examples.append(Example(one, other, where))
    return Reading(examples, f"{source} and {target}", "one text per line")


def _some(examples: list[Example], name: object) -> list[Example]:
    if not examples:
        raise DataError(f"{name} is empty: it contains no example.")
    return examples
