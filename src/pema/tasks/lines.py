"""Lines of UTF-8 text files, plain or compressed, with clear errors for every other format."""

from __future__ import annotations

import bz2
import contextlib
import gzip
import io
import lzma
import re
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, cast

from pema.errors import ConfigError, DataError
from pema.extras import installs

BOM = b"\xef\xbb\xbf"


Opener = Callable[[Path, str], IO[bytes]]


def _open_zstd(path: Path, _mode: str) -> IO[bytes]:
    try:
        import pyarrow
    except ImportError as error:
        raise ConfigError(
            f"{path} is compressed by zstd, which needs the package pyarrow: {installs('datasets')}. Or "
            "decompress it (zstd -d FILE)."
        ) from error
    return io.BufferedReader(pyarrow.input_stream(str(path), compression="zstd"))


COMPRESSED: dict[str, tuple[bytes, Any]] = {
    ".gz": (rb"\x1f\x8b", gzip.open),
    ".bz2": (rb"BZh[1-9](1AY&SY|\x17rE8P\x90)", bz2.open),
    ".xz": (rb"\xfd7zXZ\x00", lzma.open),
    ".zst": (rb"\x28\xb5\x2f\xfd", _open_zstd),
}
"""First bytes (as a pattern) and opener of each supported compression, by file name extension."""

MAGIC = b"PAR1"
"""First bytes of a Parquet file."""

FOREIGN = (
    (rb"PK\x03\x04", "a zip archive (as .xlsx is)", "unpack it, or save the sheet as CSV"),
    (rb"\xd0\xcf\x11\xe0", "an old Office file (as .xls is)", "save the sheet as CSV"),
    (rb"7z\xbc\xaf\x27\x1c", "a 7-Zip archive", "unpack it"),
    (rb".{257}ustar", "a tar archive", "unpack it"),
    (rb"\x04\x22\x4d\x18", "compressed by LZ4", "decompress it (lz4 -d FILE)"),
    (MAGIC, "a Parquet file", "give it as data (--data)"),
    (rb"ARROW1", "an Arrow file", "give the folder that Dataset.save_to_disk wrote"),
    (rb"\x80[\x02-\x05]", "a pickle, which can run any code when it is read", "write JSONL or Parquet"),
    (rb"\x93NUMPY", "an array of numpy", "write JSONL or Parquet"),
    (rb"\x89HDF", "an HDF5 file", "write JSONL or Parquet"),
    (rb"SQLite format 3", "an SQLite database", "export a table as CSV"),
    (rb"%PDF", "a PDF", "give a text file"),
    (rb"\x89PNG|\xff\xd8\xff|GIF8", "an image", "give a text file"),
    (rb"version https://git-lfs", "a pointer of Git LFS, not the file itself", "fetch the file (git lfs pull)"),
)
"""First bytes of unsupported formats (as patterns), their names, and what to do instead."""

FIRST = 300
"""Number of bytes that tell a format."""

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
    return next((name.removesuffix(end) for end in (*COMPRESSED, ".zip") if name.endswith(end)), name)


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
    """Yield the lines of a file as bytes, without line ends and byte-order mark.

    Raises:
        DataError: the file is missing, empty, damaged or in another format, which the message names.
        ConfigError: a package that decompresses it is not installed.
    """
    empty = True
    with opened(path) as file:
        for raw in file:
            line = raw.removesuffix(b"\n").removesuffix(b"\r")
            if empty:
                _require_text(line, path)
                line = line.removeprefix(BOM)
                if not line and raw.startswith(BOM) and not raw.endswith(b"\n"):
                    break
            empty = False
            yield line
    if empty:
        raise DataError(f"{path} is empty.")


def text_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield each line of a file with its number, counted from 1; see `raw_lines`.

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


@contextlib.contextmanager
def opened(path: Path) -> Iterator[IO[bytes]]:
    """Open a file, decompressed if its first bytes or its name say that it is compressed.

    Raises:
        DataError: the path is not a file, or reading it inside the block fails.
        ConfigError: a package that decompresses it is not installed.
    """
    require(path)
    try:
        with path.open("rb") as file:
            first = file.read(FIRST)
        with compression_of(path, first)(path, "rb") as content:
            yield content
    except EOFError as error:
        raise DataError(f"{path} is truncated: its compressed stream has no end. Copy or download it again.") from error
    except (gzip.BadGzipFile, zlib.error, lzma.LZMAError) as error:
        raise DataError(f"{path} is a damaged compressed file: {error}. Copy or download it again.") from error
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}.") from error


def compression_of(path: Path, first: bytes) -> Opener:
    """Return what opens a file: its first bytes say how it is compressed, or its name if they say nothing else."""
    foreign = any(re.match(magic, first, re.DOTALL) for magic, *_ in FOREIGN)
    for end, (magic, opener) in COMPRESSED.items():
        if re.match(magic, first) or (path.suffix.lower() == end and not foreign):
            return cast(Opener, opener)
    return Path.open


def _require_text(line: bytes, path: Path) -> None:
    """Refuse a file whose first bytes are those of another format."""
    for magic, what, remedy in FOREIGN:
        if re.match(magic, line, re.DOTALL):
            raise DataError(f"{path} is {what}, not a text file: {remedy}.")
    for mark, encoding in MARKS.items():
        if line.startswith(mark):
            raise DataError(
                f"{path} is in {encoding}, not in UTF-8: convert it, e.g. with iconv -f {encoding} -t UTF-8."
            )
