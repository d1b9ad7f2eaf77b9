"""Lines of UTF-8 text files, plain or compressed, with clear errors for every other format."""

from __future__ import annotations

import bz2
import gzip
import lzma
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from pema.errors import DataError

BOM = b"\xef\xbb\xbf"
COMPRESSED: dict[str, tuple[bytes, Any]] = {
    ".gz": (rb"\x1f\x8b", gzip.open),
    ".bz2": (rb"BZh[1-9](1AY&SY|\x17rE8P\x90)", bz2.open),
    ".xz": (rb"\xfd7zXZ\x00", lzma.open),
}
"""First bytes (as a pattern) and opener of each supported compression, by file name extension."""

FOREIGN = (
    (b"PK\x03\x04", "a zip archive (as .xlsx is)", "unpack it, or save a sheet as TSV"),
    (b"\x28\xb5\x2f\xfd", "compressed by zstd", "decompress it (zstd -d FILE), or compress it by gzip, bzip2 or xz"),
    (b"7z\xbc\xaf\x27\x1c", "a 7-Zip archive", "unpack it"),
    (b"\x04\x22\x4d\x18", "compressed by LZ4", "decompress it (lz4 -d FILE)"),
    (b"PAR1", "a Parquet file", "load it with datasets.load_dataset('parquet', data_files=...) and pass the rows"),
    (b"ARROW1", "an Arrow file", "give the folder that Dataset.save_to_disk wrote"),
    (b"SQLite format 3", "an SQLite database", "export a table as TSV"),
    (b"%PDF", "a PDF", "give a text file"),
)
"""First bytes of unsupported formats, their names, and what to do instead."""

MARKS = {
    b"\xff\xfe\x00\x00": "UTF-32",
    b"\x00\x00\xfe\xff": "UTF-32",
    b"\xff\xfe": "UTF-16",
    b"\xfe\xff": "UTF-16",
}
"""Byte-order marks of other encodings."""

SHORT = 8
"""Minimum length in bytes of a line from which the encoding can be guessed."""


def stem(path: Path) -> str:
    """Return the file name in lower case, without the extension of a compressed file."""
    name = path.name.lower()
    return next((name.removesuffix(end) for end in (*COMPRESSED, ".zst", ".zip") if name.endswith(end)), name)


def require(path: Path) -> None:
    """Refuse a path that is not a file.

    Raises:
        DataError: the path does not exist, or is a folder.
    """
    if path.is_dir():
        raise DataError(f"{path} is a folder, not a text file.")
    if not path.exists():
        raise DataError(f"{path} does not exist: check the path.")


def raw_lines(path: Path) -> Iterator[bytes]:
    """Yield the lines of a file as bytes, without line ends and without a byte-order mark.

    Raises:
        DataError: the file is missing, empty, damaged or in another format, which the message names.
    """
    require(path)
    empty = True
    try:
        with _opened(path) as file:
            for raw in file:
                line = raw.removesuffix(b"\n").removesuffix(b"\r")
                if empty:
                    _require_text(line, path)
                    line = line.removeprefix(BOM)
                    if not line and raw.startswith(BOM) and not raw.endswith(b"\n"):
                        break
                empty = False
                yield line
    except EOFError as error:
        raise DataError(f"{path} is truncated: its compressed stream has no end. Copy or download it again.") from error
    except (gzip.BadGzipFile, zlib.error, lzma.LZMAError) as error:
        raise DataError(f"{path} is a damaged compressed file: {error}. Copy or download it again.") from error
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}.") from error
    if empty:
        raise DataError(f"{path} is empty.")


def text_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield each line of a file with its number, counted from 1.

    Raises:
        DataError: see `raw_lines`; or a line is not UTF-8.
    """
    for number, raw in enumerate(raw_lines(path), start=1):
        yield number, decode(raw, path, number)


def decode(raw: bytes, path: Path, number: int) -> str:
    """Decode a line.

    Raises:
        DataError: the line is not UTF-8.
    """
    if number == 1 and len(raw) >= SHORT and 4 * raw.count(0) >= len(raw):
        raise DataError(
            f"{path} looks like UTF-16 without a byte-order mark (its first line contains NUL bytes): convert it, e.g. "
            "with iconv -f UTF-16LE -t UTF-8."
        )
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}:{number}: invalid UTF-8 at byte {error.start + 1} of the line (0x{raw[error.start]:02x}). "
            "Convert the file from its encoding, e.g. with iconv -f WINDOWS-1252 -t UTF-8."
        ) from error


def _opened(path: Path) -> IO[bytes]:
    """Open a file, decompressed if its first bytes or its name say that it is compressed."""
    with path.open("rb") as file:
        first = file.read(16)
    for end, (magic, opener) in COMPRESSED.items():
        if re.match(magic, first) or path.suffix.lower() == end:
            opened: IO[bytes] = opener(path, "rb")
            return opened
    return path.open("rb")


def _require_text(line: bytes, path: Path) -> None:
    """Refuse a file whose first bytes are those of another format."""
    for magic, what, remedy in FOREIGN:
        if line.startswith(magic):
            raise DataError(f"{path} is {what}, not a text file: {remedy}.")
    for mark, encoding in MARKS.items():
        if line.startswith(mark):
            raise DataError(
                f"{path} is in {encoding}, not in UTF-8: convert it, e.g. with iconv -f {encoding} -t UTF-8."
            )
