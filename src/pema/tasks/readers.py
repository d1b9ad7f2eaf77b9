"""Examples from JSONL, TSV, parallel text files and Hugging Face datasets.

Text is UTF-8, with or without a byte-order mark, plain or compressed by gzip, bzip2 or xz. A line ends at a line feed,
or at a carriage return and a line feed, and nowhere else: U+2028 and similar characters are part of the text. Cells of
a TSV file are literal, or quoted as csv writers do (`pema.tasks.tables`).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain, islice, zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pema.errors import ConfigError, DataError
from pema.schema import require
from pema.tasks.example import Example
from pema.tasks.lines import decode, raw_lines, stem, text_lines
from pema.tasks.tables import table_rows

if TYPE_CHECKING:
    from datasets import Dataset

HUB = "hf:"
HUB_NAME = re.compile(r"(?P<name>[^:\[]+)(:(?P<config>[^:\[]+))?:(?P<split>[^:\[]+(\[[^\]]*\][^:\[]*)*)")
"""NAME:SPLIT or NAME:CONFIG:SPLIT; a split may contain slices, as in `train[:10%]`."""

JSONL = (".jsonl", ".ndjson", ".json")
TSV = (".tsv", ".tab")


def read_examples(
    *,
    data: str | Path | None = None,
    source: str | Path | None = None,
    target: str | Path | None = None,
    source_field: str = "source",
    target_field: str = "target",
    limit: int | None = None,
) -> list[Example]:
    """Read the examples of one data set.

    Args:
        data: a JSONL file (`.jsonl`, `.ndjson`, or `.json` with one object per line), a TSV file (`.tsv`), a folder
            written by `Dataset.save_to_disk`, or `hf:NAME:SPLIT` or `hf:NAME:CONFIG:SPLIT` on the Hugging Face Hub.
        source: a text file with one source per line; with `target`, instead of `data`.
        target: a text file with one target per line, aligned with `source`.
        source_field: the field of `data` that contains the source. Dots select nested fields (`translation.en`,
            `answers.text.0`). In a TSV file: a column name from the first line, or a column number, counted from 1;
            without either, the file must have two columns, source and target.
        target_field: the same for the target.
        limit: the number of examples to read; default: all.

    Raises:
        DataError: a file is missing, empty, misaligned or malformed; the message names the file and the line.
        ConfigError: the arguments name no data set, or more than one.
    """
    require("limit", limit, int | None)
    if limit is not None and limit < 1:
        raise ConfigError(f"limit {limit} leaves no example: give 1 or more, or None for all.")
    if data is not None:
        if source is not None or target is not None:
            raise ConfigError("give either data (one file with both fields) or source and target, not both.")
        return _read_data(str(data), source_field, target_field, limit)
    if source is None or target is None:
        raise ConfigError("no data: give source and target (two aligned text files), or data (one file with both).")
    return _read_parallel(Path(source), Path(target), limit)


def read_lines(path: str | Path) -> list[str]:
    """Read the lines of a text file without line ends; blank lines are kept.

    Raises:
        DataError: the file is missing, empty or not UTF-8.
    """
    return [line for _, line in text_lines(Path(path))]


def from_dataset(dataset: Dataset, source_field: str, target_field: str, limit: int | None = None) -> list[Example]:
    """Read the examples of a Hugging Face `datasets.Dataset`, or of any iterable of mappings.

    A column of class labels (`ClassLabel`) yields the class names.

    Raises:
        DataError: a field is missing, blank, NaN or not text, or a class has no name; the message names the row,
            counted from 0 as `datasets` does.
    """
    return _from_rows(dataset, "dataset", source_field, target_field, limit)


def _read_data(data: str, source_field: str, target_field: str, limit: int | None) -> list[Example]:
    if data.startswith(HUB):
        return _from_rows(_load_hub(data), data, source_field, target_field, limit)
    path = Path(data)
    if path.is_dir():
        return _from_rows(_load_folder(path), data, source_field, target_field, limit)
    name = stem(path)
    if name.endswith(JSONL):
        examples = _from_jsonl(path, source_field, target_field)
    elif name.endswith(TSV):
        examples = _from_tsv(path, source_field, target_field)
    else:
        next(raw_lines(path))
        raise DataError(
            f"{path}: cannot tell the format from the name. Name it .jsonl or .tsv (.gz, .bz2 or .xz may follow), or "
            "give two text files as source and target."
        )
    return _some(list(islice(examples, limit)), path)


def _read_parallel(source: Path, target: Path, limit: int | None) -> list[Example]:
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
            texts = (decode(left, source, number), decode(right, target, number))
            for text, path, role in zip(texts, (source, target), ("source", "target"), strict=True):
                _filled(text, f"{path}:{number}", role)
            examples.append(Example(*texts, where=f"{source}:{number}"))
    return examples


def _from_jsonl(path: Path, source_field: str, target_field: str) -> Iterator[Example]:
    for number, line in text_lines(path):
        where = f"{path}:{number}"
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"{where}: not JSON, column {error.colno}: {error.msg}.") from error
        except RecursionError as error:
            raise DataError(f"{where}: JSON nested too deeply.") from error
        if not isinstance(row, dict):
            raise DataError(f"{where}: a JSON {type(row).__name__}, not an object. Write one object per line.")
        yield _example(row, where, source_field, target_field)


def _from_tsv(path: Path, source_field: str, target_field: str) -> Iterator[Example]:
    rows = table_rows(path)
    number, header = next(rows)
    if source_field in header and target_field in header:
        columns = (header.index(source_field), header.index(target_field))
        width = len(header)
    else:
        rows = chain([(number, header)], rows)
        if source_field.isdecimal() and target_field.isdecimal() and "0" not in (source_field, target_field):
            columns, width = (int(source_field) - 1, int(target_field) - 1), 0
        elif (source_field, target_field) == ("source", "target"):
            columns, width = (0, 1), 2
        else:
            raise DataError(
                f"{path}:1: no columns {source_field!r} and {target_field!r}; the first line contains "
                f"{_names(header)}. Name two of its columns, or give their numbers."
            )
    for number, cells in rows:
        where = f"{path}:{number}"
        if width and len(cells) != width:
            advice = "" if width != 2 else " Give column numbers if there are more columns."
            raise DataError(f"{where}: {len(cells)} columns, expected {width} (separated by tabs).{advice}")
        if max(columns) >= len(cells):
            raise DataError(f"{where}: no column {max(columns) + 1}; the line has {len(cells)} (separated by tabs).")
        source, target = cells[columns[0]], cells[columns[1]]
        yield Example(_filled(source, where, "source"), _filled(target, where, "target"), where)


def _from_rows(
    rows: Iterable[Any], name: str, source_field: str, target_field: str, limit: int | None
) -> list[Example]:
    if isinstance(rows, Mapping):
        raise DataError(
            f"{name} contains several splits ({_names(rows)}): name one, e.g. dataset[{next(iter(rows))!r}]."
        )
    features = getattr(rows, "features", None)
    names = {field: _class_names(features, field) for field in (source_field, target_field)}
    examples = (
        _example(row, f"{name}, row {number}", source_field, target_field, names)
        for number, row in enumerate(islice(rows, limit))
    )
    return _some(list(examples), name)


def _class_names(features: Any, field: str) -> Sequence[str] | None:  # noqa: ANN401 - features of an optional package
    """Return the class names of a field of class labels, else None; see `_field` for nested fields."""
    feature = features
    for part in [field] if isinstance(features, Mapping) and field in features else field.split("."):
        inner = getattr(feature, "feature", None)  # of a list
        feature = feature.get(part) if isinstance(feature, Mapping) else inner if part.isdecimal() else None
    return feature.names if hasattr(feature, "int2str") else None


def _load_hub(data: str) -> Any:  # noqa: ANN401 - a Dataset, of an optional package
    match = HUB_NAME.fullmatch(data.removeprefix(HUB))
    if match is None:
        raise ConfigError(f"{data!r} is not hf:NAME:SPLIT or hf:NAME:CONFIG:SPLIT, e.g. hf:wmt/wmt14:de-en:test.")
    datasets = _datasets()
    try:
        return datasets.load_dataset(match["name"], match["config"], split=match["split"])
    except (OSError, ValueError, RuntimeError) as error:
        raise DataError(f"{data} cannot be loaded: {error}.") from error


def _load_folder(path: Path) -> Any:  # noqa: ANN401 - a Dataset, of an optional package
    datasets = _datasets()
    try:
        dataset = datasets.load_from_disk(str(path))
    except (OSError, ValueError, RuntimeError) as error:
        raise DataError(f"{path} is a folder, but not one that Dataset.save_to_disk wrote: {error}.") from error
    if isinstance(dataset, Mapping):
        raise DataError(
            f"{path} contains several splits ({_names(dataset)}): name one, e.g. {path / next(iter(dataset))}."
        )
    return dataset


def _datasets() -> Any:  # noqa: ANN401 - a module
    try:
        import datasets
    except ImportError as error:
        raise ConfigError("Hugging Face datasets need the package datasets: pip install 'pema[datasets]'.") from error
    return datasets


def _example(
    row: object,
    where: str,
    source_field: str,
    target_field: str,
    names: Mapping[str, Sequence[str] | None] | None = None,
) -> Example:
    def filled(field: str) -> str:
        value = _field(row, field, where)
        return _filled(_text(value, field, where, None if names is None else names[field]), where, field)

    return Example(filled(source_field), filled(target_field), where)


def _field(row: object, field: str, where: str) -> Any:  # noqa: ANN401
    """Return the value of a field, which may be nested."""
    if isinstance(row, Mapping) and field in row:
        return row[field]
    value = row
    for part in field.split("."):
        if isinstance(value, Mapping) and part in value:
            value = value[part]
        elif isinstance(value, list) and part.isdecimal() and int(part) < len(value):
            value = value[int(part)]
        else:
            raise DataError(f"{where}: no field {field!r}; {_there(row)}. Name the fields that contain the texts.")
    return value


def _text(value: object, field: str, where: str, names: Sequence[str] | None) -> str:
    """Convert a value to text: numbers (often labels) to their digits, class labels to their names."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        raise DataError(f"{where}: field {field!r} is missing ({value}). Remove the pair or fill it in.")
    if isinstance(value, int) and names is not None:
        if not 0 <= value < len(names):
            raise DataError(
                f"{where}: field {field!r} is class {value}, which has no name (only 0 to {len(names) - 1} do): give a "
                "split of the data set that has labels."
            )
        return str(names[value])
    if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        return str(value)
    if not isinstance(value, str):
        inside = f" ({_names(value)})" if isinstance(value, Mapping) else ""
        what = str(value) if isinstance(value, float) else f"a {type(value).__name__}{inside}"
        raise DataError(f"{where}: field {field!r} is {what}, not a text.")
    return value


def _filled(text: str, where: str, role: str) -> str:
    if not text.strip():
        raise DataError(f"{where}: {role} is blank. Remove the pair or fill it in.")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(f"{where}: {role} contains half of a surrogate pair at character {error.start + 1}.") from error
    return text


def _some(examples: list[Example], name: object) -> list[Example]:
    if not examples:
        raise DataError(f"{name} is empty: it contains no example.")
    return examples


def _there(row: object) -> str:
    return f"there: {_names(row)}" if isinstance(row, Mapping) else f"it is a {type(row).__name__}"


def _names(names: Iterable[Any]) -> str:
    return ", ".join(repr(name) for name in names) or "nothing"
