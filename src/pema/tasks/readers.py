"""Examples from JSONL, TSV, parallel text files and Hugging Face datasets.

Text is UTF-8, with or without a byte-order mark, plain or gzipped (`.gz`). A line ends at a line feed, or a carriage
return and a line feed, and nowhere else: U+2028 and its like are characters of the text.
"""

from __future__ import annotations

import gzip
import json
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice, zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pema.errors import ConfigError, DataError
from pema.tasks.example import Example

if TYPE_CHECKING:
    from datasets import Dataset

BOM = b"\xef\xbb\xbf"
HUB = "hf:"
HUB_NAME = re.compile(r"(?P<name>[^:\[]+)(:(?P<config>[^:\[]+))?:(?P<split>[^:\[]+(\[[^\]]*\][^:\[]*)*)")
"""NAME:SPLIT or NAME:CONFIG:SPLIT; a split may hold slices, as in `train[:10%]`."""

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
        data: a JSONL file (`.jsonl`, `.ndjson`, or `.json` with one object a line), a TSV file (`.tsv`), a folder
            written by `Dataset.save_to_disk`, or `hf:NAME:SPLIT` or `hf:NAME:CONFIG:SPLIT` on the Hugging Face Hub.
        source: a text file with one source a line; with `target`, in place of `data`.
        target: a text file with one target a line, aligned with `source`.
        source_field: the field of `data` that holds the source. Dots reach into nested fields (`translation.en`,
            `answers.text.0`). In a TSV file: a column's name in the first line, or its number, counted from 1; with
            neither, the file has two columns, source and target.
        target_field: the same for the target.
        limit: the number of examples to read; all by default.

    Raises:
        DataError: a file is missing, empty, misaligned or malformed; the message names the file and the line.
        ConfigError: the arguments name no data set, or more than one.
    """
    if limit is not None and limit < 1:
        raise ConfigError(f"limit {limit} leaves no example: give 1 or more, or none for all.")
    if data is not None:
        if source is not None or target is not None:
            raise ConfigError("give either data (one file with both fields) or source and target, not both.")
        return _read_data(str(data), source_field, target_field, limit)
    if source is None or target is None:
        raise ConfigError("no data: give source and target (two aligned text files), or data (one file with both).")
    return _read_parallel(Path(source), Path(target), limit)


def read_lines(path: str | Path) -> list[str]:
    """Read a text file's lines, without their ends; blank lines are kept.

    Raises:
        DataError: the file is missing, empty or not UTF-8.
    """
    return [line for _, line in _lines(Path(path))]


def from_dataset(dataset: Dataset, source_field: str, target_field: str, limit: int | None = None) -> list[Example]:
    """Read the examples of a Hugging Face `datasets.Dataset`, or of any iterable of mappings.

    Raises:
        DataError: a field is missing, blank or not text; the message names the row, counted from 0 as `datasets` does.
    """
    return _from_rows(dataset, "dataset", source_field, target_field, limit)


def _read_data(data: str, source_field: str, target_field: str, limit: int | None) -> list[Example]:
    if data.startswith(HUB):
        return _from_rows(_load_hub(data), data, source_field, target_field, limit)
    path = Path(data)
    if path.is_dir():
        return _from_rows(_load_folder(path), data, source_field, target_field, limit)
    name = path.name.lower().removesuffix(".gz")
    if name.endswith(JSONL):
        found = _from_jsonl(path, source_field, target_field)
    elif name.endswith(TSV):
        found = _from_tsv(path, source_field, target_field)
    else:
        _require(path)
        raise DataError(
            f"{path}: cannot tell the format from the name. Name it .jsonl or .tsv (.gz may follow), or give two text "
            "files as source and target."
        )
    return _some(list(islice(found, limit)), path)


def _read_parallel(source: Path, target: Path, limit: int | None) -> list[Example]:
    examples: list[Example] = []
    pairs = zip_longest(_raw_lines(source), _raw_lines(target))
    for number, (left, right) in enumerate(pairs, start=1):
        if left is None or right is None:
            longer = target if left is None else source
            rest = number + sum(1 for _ in pairs)
            counts = (number - 1, rest) if left is None else (rest, number - 1)
            raise DataError(
                f"{source} and {target} are not aligned: {counts[0]} and {counts[1]} lines; {longer}:{number} has no "
                "partner. Give files with one source and one target a line."
            )
        if limit is None or number <= limit:
            texts = (_decode(left, source, number), _decode(right, target, number))
            for text, path, role in zip(texts, (source, target), ("source", "target"), strict=True):
                _filled(text, f"{path}:{number}", role)
            examples.append(Example(*texts, where=f"{source}:{number}"))
    return examples


def _from_jsonl(path: Path, source_field: str, target_field: str) -> Iterator[Example]:
    for number, line in _lines(path):
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
            raise DataError(f"{where}: a JSON {type(row).__name__}, not an object. Write one object a line.")
        yield _example(row, where, source_field, target_field)


def _from_tsv(path: Path, source_field: str, target_field: str) -> Iterator[Example]:
    lines = _lines(path)
    number, first = next(lines)
    header = first.split("\t")
    if source_field in header and target_field in header:
        columns = (header.index(source_field), header.index(target_field))
        width = len(header)
    else:
        lines = _prepend((number, first), lines)
        if source_field.isdecimal() and target_field.isdecimal() and "0" not in (source_field, target_field):
            columns, width = (int(source_field) - 1, int(target_field) - 1), 0
        elif (source_field, target_field) == ("source", "target"):
            columns, width = (0, 1), 2
        else:
            raise DataError(
                f"{path}:1: no columns {source_field!r} and {target_field!r}; the first line holds {_names(header)}. "
                "Name two of its columns, or give their numbers."
            )
    for number, line in lines:
        where = f"{path}:{number}"
        cells = line.split("\t")
        if width and len(cells) != width:
            advice = "" if width != 2 else " Name the columns by number where there are more."
            raise DataError(f"{where}: {len(cells)} columns where {width} belong (separated by tabs).{advice}")
        if max(columns) >= len(cells):
            raise DataError(f"{where}: no column {max(columns) + 1}; the line has {len(cells)} (separated by tabs).")
        source, target = cells[columns[0]], cells[columns[1]]
        yield Example(_filled(source, where, "source"), _filled(target, where, "target"), where)


def _from_rows(
    rows: Iterable[Any], name: str, source_field: str, target_field: str, limit: int | None
) -> list[Example]:
    if isinstance(rows, Mapping):
        raise DataError(f"{name} holds several splits ({_names(rows)}): name one, e.g. dataset[{next(iter(rows))!r}].")
    found = (
        _example(row, f"{name}, row {number}", source_field, target_field)
        for number, row in enumerate(islice(rows, limit))
    )
    return _some(list(found), name)


def _load_hub(data: str) -> Any:  # noqa: ANN401 - a Dataset, of an optional package
    found = HUB_NAME.fullmatch(data.removeprefix(HUB))
    if found is None:
        raise ConfigError(f"{data!r} is not hf:NAME:SPLIT or hf:NAME:CONFIG:SPLIT, e.g. hf:wmt/wmt14:de-en:test.")
    datasets = _datasets()
    try:
        return datasets.load_dataset(found["name"], found["config"], split=found["split"])
    except (OSError, ValueError, RuntimeError) as error:
        raise DataError(f"{data} cannot be loaded: {error}.") from error


def _load_folder(path: Path) -> Any:  # noqa: ANN401 - a Dataset, of an optional package
    datasets = _datasets()
    try:
        found = datasets.load_from_disk(str(path))
    except (OSError, ValueError, RuntimeError) as error:
        raise DataError(f"{path} is a folder, but not one that Dataset.save_to_disk wrote: {error}.") from error
    if isinstance(found, Mapping):
        raise DataError(f"{path} holds several splits ({_names(found)}): name one, e.g. {path / next(iter(found))}.")
    return found


def _datasets() -> Any:  # noqa: ANN401 - a module
    try:
        import datasets
    except ImportError as error:
        raise ConfigError('Hugging Face datasets need the package datasets: pip install "pema[datasets]".') from error
    return datasets


def _example(row: object, where: str, source_field: str, target_field: str) -> Example:
    source = _filled(_field(row, source_field, where), where, source_field)
    return Example(source, _filled(_field(row, target_field, where), where, target_field), where)


def _field(row: object, field: str, where: str) -> str:
    """The text of a field; numbers, as labels often are, become text."""
    value = row
    if isinstance(row, Mapping) and field in row:
        value = row[field]
    else:
        for part in field.split("."):
            if isinstance(value, Mapping) and part in value:
                value = value[part]
            elif isinstance(value, list) and part.isdecimal() and int(part) < len(value):
                value = value[int(part)]
            else:
                raise DataError(f"{where}: no field {field!r}; {_there(row)}. Name the fields that hold the texts.")
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str):
        inside = f" ({_names(value)})" if isinstance(value, Mapping) else ""
        raise DataError(f"{where}: field {field!r} is a {type(value).__name__}{inside}, not a text.")
    return value


def _filled(text: str, where: str, role: str) -> str:
    if not text.strip():
        raise DataError(f"{where}: {role} is blank. Remove the pair or fill it in.")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(f"{where}: {role} holds half of a surrogate pair at character {error.start + 1}.") from error
    return text


def _some(examples: list[Example], name: object) -> list[Example]:
    if not examples:
        raise DataError(f"{name} is empty: no example in it.")
    return examples


def _there(row: object) -> str:
    return f"there: {_names(row)}" if isinstance(row, Mapping) else f"it is a {type(row).__name__}"


def _names(names: Iterable[Any]) -> str:
    return ", ".join(repr(name) for name in names) or "nothing"


def _prepend(first: tuple[int, str], rest: Iterator[tuple[int, str]]) -> Iterator[tuple[int, str]]:
    yield first
    yield from rest


def _require(path: Path) -> None:
    if path.is_dir():
        raise DataError(f"{path} is a folder, not a text file.")
    if not path.exists():
        raise DataError(f"{path} does not exist: check the path.")


def _raw_lines(path: Path) -> Iterator[bytes]:
    """The lines of a file in bytes, without their ends and without a byte-order mark."""
    _require(path)
    empty = True
    try:
        with gzip.open(path, "rb") if path.suffix.lower() == ".gz" else path.open("rb") as file:
            for raw in file:
                line = raw.removesuffix(b"\n").removesuffix(b"\r")
                if empty:
                    line = line.removeprefix(BOM)
                    if not line and raw.startswith(BOM) and not raw.endswith(b"\n"):
                        break
                empty = False
                yield line
    except EOFError as error:
        raise DataError(f"{path} is cut short: its gzip stream has no end.") from error
    except (gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"{path} is not a sound gzip file: {error}.") from error
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}.") from error
    if empty:
        raise DataError(f"{path} is empty.")


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    for number, raw in enumerate(_raw_lines(path), start=1):
        yield number, _decode(raw, path, number)


def _decode(raw: bytes, path: Path, number: int) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        utf16 = number == 1 and raw.startswith((b"\xff\xfe", b"\xfe\xff"))
        advice = "It looks like UTF-16: convert it" if utf16 else "Convert the file"
        raise DataError(
            f"{path}:{number}: invalid UTF-8 at byte {error.start + 1} of the line (0x{raw[error.start]:02x}). "
            f"{advice}, e.g. with iconv."
        ) from error
