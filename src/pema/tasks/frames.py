"""Rows of Parquet files, data frames, Hugging Face data sets and iterables, through the libraries that they are of."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from pema.errors import ConfigError, DataError
from pema.extras import installs
from pema.tasks.lines import opened
from pema.tasks.rows import Rows, Table
from pema.tasks.values import kind_of, listed

HUB = "hf:"
HUB_NAME = re.compile(r"(?P<name>[^:\[]+)(:(?P<config>[^:\[]+))?:(?P<split>[^:\[]+(\[[^\]]*\][^:\[]*)*)")
"""NAME:SPLIT or NAME:CONFIG:SPLIT; a split may contain slices, as in `train[:10%]`."""

NAME = "data"
"""The name of what has no file, in messages."""

BATCH = 1024
"""Number of rows that are converted at a time."""

KINDS = (
    "a path, a data frame (pandas, polars, Arrow), a data set of Hugging Face, or an iterable of mappings such as "
    "{'source': ..., 'target': ...}"
)


def parquet_table(path: Path) -> Table:
    """Return the rows of a Parquet file, which may be compressed as a whole.

    Raises:
        DataError: the file is damaged.
        ConfigError: pyarrow is not installed.
    """
    arrow = _pyarrow("Parquet files")
    import pyarrow.parquet

    with opened(path) as content:
        raw = content.read()
    try:
        file = pyarrow.parquet.ParquetFile(arrow.BufferReader(raw))
    except (OSError, arrow.ArrowException) as error:
        raise _damaged(path, error) from error

    def read(columns: Sequence[str] | None) -> Rows:
        batches = file.iter_batches(BATCH, columns=None if columns is None else list(columns))
        try:
            yield from _numbered(str(path), (row for batch in batches for row in batch.to_pylist()))
        except (OSError, arrow.ArrowException) as error:
            raise _damaged(path, error) from error

    return Table(str(path), read, tuple(file.schema_arrow.names))


def table_of(data: object) -> Table:
    """Return the rows of an object: a data frame, a data set or an iterable of mappings.

    Raises:
        DataError: a mapping (of splits, or of columns) instead of rows.
        ConfigError: the object is of another kind, or a package that reads it is not installed.
    """
    if isinstance(data, Mapping):
        first = next(iter(data), "train")
        raise DataError(
            f"{NAME} is a mapping of {listed(data)}, not rows: of several splits, give one ({NAME}[{first!r}]); of "
            "columns, make a frame (pandas.DataFrame(data))."
        )
    if hasattr(data, "features") and hasattr(data, "column_names"):
        return dataset_table(data, NAME)
    if hasattr(data, "iloc") and hasattr(data, "columns"):
        return Table(NAME, lambda columns: _pandas_rows(data, columns), tuple(map(str, data.columns)))
    if hasattr(data, "__arrow_c_stream__"):
        stream = _pyarrow(f"{kind_of(data)} is read through pyarrow; such frames").RecordBatchReader.from_stream(data)
        rows = (row for batch in stream for row in batch.to_pylist())
        return Table(NAME, lambda _: _numbered(NAME, rows), tuple(stream.schema.names))
    if isinstance(data, str | bytes) or not isinstance(data, Iterable):
        collect = " Call its collect() first." if hasattr(data, "collect") else ""
        raise ConfigError(f"{NAME} is {kind_of(data)}: give {KINDS}.{collect}")
    return Table(NAME, lambda _: _numbered(NAME, iter(data)))


def dataset_table(dataset: Any, name: str) -> Table:  # noqa: ANN401 - of an optional package
    """Return the rows of a Hugging Face data set; one that streams is consumed once."""
    columns = dataset.column_names
    plain = (getattr(dataset, "format", None) or {}).get("type") is None

    def read(wanted: Sequence[str] | None) -> Rows:
        some = dataset if wanted is None or not plain else dataset.select_columns(list(wanted))
        if not hasattr(some, "__len__"):
            return _numbered(name, some)
        return _numbered(name, chain.from_iterable(map(_rows_of, some.iter(BATCH))))

    return Table(name, read, tuple(columns) if columns and plain else None, dataset.features)


def folder_table(path: Path) -> Table:
    """Return the rows of a folder that `Dataset.save_to_disk` wrote.

    Raises:
        DataError: it is another folder, or contains several splits.
        ConfigError: the package datasets is not installed.
    """
    datasets = _datasets()
    try:
        dataset = datasets.load_from_disk(str(path))
    except (OSError, ValueError, RuntimeError) as error:
        raise DataError(
            f"{path} is a folder, but not one that Dataset.save_to_disk wrote: {error}. Give a file of it."
        ) from error
    if isinstance(dataset, Mapping):
        raise DataError(
            f"{path} contains several splits ({listed(dataset)}): name one, e.g. {path / next(iter(dataset))}."
        )
    return dataset_table(dataset, str(path))


def hub_table(data: str) -> Table:
    """Return the rows of a data set on the Hugging Face Hub, `hf:NAME:SPLIT` or `hf:NAME:CONFIG:SPLIT`.

    Raises:
        ConfigError: it is not such a name, or the package datasets is not installed.
        DataError: it cannot be loaded.
    """
    match = HUB_NAME.fullmatch(data.removeprefix(HUB))
    if match is None:
        raise ConfigError(f"{data!r} is not hf:NAME:SPLIT or hf:NAME:CONFIG:SPLIT, e.g. hf:wmt/wmt14:de-en:test.")
    datasets = _datasets()
    try:
        dataset = datasets.load_dataset(match["name"], match["config"], split=match["split"])
    except (OSError, ValueError, RuntimeError) as error:
        raise DataError(f"{data} cannot be loaded: {error}.") from error
    return dataset_table(dataset, data)


def _numbered(name: str, rows: Iterable[Any]) -> Rows:
    for number, row in enumerate(rows):
        yield f"{name}, row {number}", row


def _rows_of(batch: Mapping[str, Sequence[Any]]) -> Iterator[dict[str, Any]]:
    for values in zip(*batch.values(), strict=True):
        yield dict(zip(batch, values, strict=True))


def _pandas_rows(frame: Any, columns: Sequence[str] | None) -> Rows:  # noqa: ANN401 - of an optional package
    names = list(map(str, frame.columns))
    used = [i for i, name in enumerate(names) if columns is None or name in columns]
    for start in range(0, len(frame), BATCH):
        part = frame.iloc[start : start + BATCH]
        values = [part.iloc[:, i].tolist() for i in used]
        for number, row in enumerate(zip(*values, strict=True), start):
            yield f"{NAME}, row {number}", dict(zip([names[i] for i in used], row, strict=True))


def _damaged(path: Path, error: Exception) -> DataError:
    return DataError(f"{path} is a damaged Parquet file: {' '.join(str(error).split())} Copy or download it again.")


def _pyarrow(what: str) -> Any:  # noqa: ANN401 - a module
    try:
        import pyarrow
    except ImportError as error:
        raise ConfigError(f"{what} need the package pyarrow: {installs('datasets')}.") from error
    return pyarrow


def _datasets() -> Any:  # noqa: ANN401 - a module
    try:
        import datasets
    except ImportError as error:
        raise ConfigError(f"Hugging Face data sets need the package datasets: {installs('datasets')}.") from error
    return datasets
