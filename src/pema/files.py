"""Atomic writes: every file is written to a work folder next to its destination, synced, then renamed.

The work folder of `NAME` is `NAME.partial`. Its writer holds the system's lock on it, which ends with the process, so
the remains of a killed writer can be distinguished from the work of a live one: the next writer of the same name
removes the former and does not touch the latter.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from pema.errors import DataError, StorageError
from pema.locks import PRIVATE, locked

TEMPORARY = ".partial"
OLD = ".old"

JSON_BYTES = 1 << 26
"""Default limit for the size of a JSON file, in bytes."""

PRIVATE_FILE = 0o600


@contextlib.contextmanager
def writing(path: Path, *, private: bool = False) -> Iterator[Path]:
    """Yield a path to write to and rename it to `path` when the block ends without an error.

    The block may write a file or create a folder. A file replaces the old one in one step. An old folder is moved
    aside, the new one takes its place, then the old one is removed; if the process is killed in between, the next
    `writing` of that name or `recover` restores the old folder.

    Args:
        path: the file or folder to write.
        private: whether only its owner may read it; otherwise the umask decides.

    Raises:
        StorageError: the disk is full, the path cannot be written, or another process writes it; the message says
            whether the previous content of `path` is unchanged.
    """
    work = path.with_name(path.name + TEMPORARY)
    new, old = work / path.name, work / (path.name + OLD)
    settled = placed = False
    try:
        if work.is_file():  # earlier versions of pema wrote to a file of this name
            work.unlink()
        with locked(work, f"another process writes {path}: wait until it has ended."):
            _put_back(path, old)
            _empty(work)
            try:
                yield new
                _settle(new, private)
                settled = True
                if new.is_dir() and path.is_dir():
                    path.rename(old)
                new.replace(path)
                sync(path.parent)
            finally:
                _put_back(path, old)
                placed = settled and not os.path.lexists(new)
                with contextlib.suppress(OSError):
                    remove(work)
    except StorageError:
        raise
    except (OSError, SafetensorError) as error:
        if isinstance(error, SafetensorError) and "os error" not in str(error):
            raise
        if placed:
            raise StorageError(
                f"{path} was written, but the disk did not confirm it: {_reason(error)}. Check the disk, then write "
                "it again."
            ) from error
        raise _refused(path, error) from error


def create(path: Path, content: bytes) -> bool:
    """Create a file that only its owner may read, atomically.

    If several processes create the same file, one succeeds, and its content stays.

    Returns:
        Whether the file was created; False if it existed (it is left unchanged).

    Raises:
        StorageError: the file cannot be written; nothing changed at `path`.
    """
    work = path.with_name(path.name + TEMPORARY)
    try:
        if os.path.lexists(path):
            return False
        with locked(work):
            _empty(work)
            try:
                descriptor = os.open(work / path.name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, PRIVATE_FILE)
                with os.fdopen(descriptor, "wb") as file:
                    file.write(content)
                    file.flush()
                    os.fsync(file.fileno())
                # A rename could replace a file that another process has just written; a link fails instead.
                os.link(work / path.name, path)
                try:
                    sync(path.parent)
                except OSError:
                    path.unlink()
                    raise
            finally:
                with contextlib.suppress(OSError):
                    remove(work)
    except FileExistsError:
        return False
    except OSError as error:
        raise _refused(path, error) from error
    return True


def recover(path: Path) -> None:
    """Restore the folder that a killed writer had moved aside, unless `path` exists.

    Raises:
        StorageError: it cannot be restored; the message says where it is.
    """
    work = path.with_name(path.name + TEMPORARY)
    old = work / (path.name + OLD)
    if os.path.lexists(path) or not os.path.lexists(old):
        return
    try:
        with locked(work):  # a live writer is about to put the new folder there
            _put_back(path, old)
            remove(work)
    except StorageError:
        raise
    except OSError as error:
        raise StorageError(
            f"{path} was being replaced and is now in {old}: move it back ({_reason(error)})."
        ) from error


def clear(path: Path) -> None:
    """Restore what a killed writer had moved aside and remove its work folder; that of a live writer is kept.

    Raises:
        StorageError: see `recover`.
    """
    recover(path)
    work = path.with_name(path.name + TEMPORARY)
    if work.is_dir():
        with contextlib.suppress(OSError), locked(work, f"another process writes {path}: wait until it has ended."):
            remove(work)


def clear_below(folder: Path) -> None:
    """Call `clear` for everything that was written directly into a folder."""
    for work in folder.glob(f"*{TEMPORARY}"):
        clear(work.with_name(work.name.removesuffix(TEMPORARY)))


def write_json(path: Path, value: Mapping[str, Any], *, private: bool = False) -> None:
    """Write `value` as indented JSON, atomically.

    Raises:
        DataError: it contains NaN or infinity, which JSON cannot represent.
        StorageError: see `writing`.
    """
    try:
        text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    except ValueError as error:
        raise DataError(f"{path} cannot be written as JSON: {error}.") from error
    with writing(path, private=private) as temporary:
        temporary.write_text(text, encoding="utf-8")


def read_json(path: Path, limit: int = JSON_BYTES) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        DataError: the file is missing, is not a regular file or longer than `limit` bytes, is not UTF-8 or not a
            JSON object; see `parse_json`.
    """
    return parse_json(read_bytes(path, limit), str(path))


def parse_json(data: bytes, what: str) -> dict[str, Any]:
    """Parse a JSON object strictly: no duplicate names, finite numbers only.

    Args:
        data: the JSON text in UTF-8.
        what: name of the data, for the message.

    Raises:
        DataError: the data is not such an object.
    """
    try:
        value = json.loads(
            data.decode("utf-8"), object_pairs_hook=_object, parse_constant=_constant, parse_float=_finite
        )
    except RecursionError:
        raise DataError(f"{what} cannot be read as JSON: it is nested too deeply.") from None
    except ValueError as error:
        raise DataError(f"{what} cannot be read as JSON: {error}.") from error
    if not isinstance(value, dict):
        raise DataError(f"{what} contains a JSON {type(value).__name__}, not an object.")
    return value


def read_bytes(path: Path, limit: int) -> bytes:
    """Read a regular file of at most `limit` bytes; pipes and devices are refused without waiting.

    Raises:
        DataError: the file does not exist, is not regular, or is longer.
    """
    try:
        with open_regular(path) as descriptor:
            size = os.fstat(descriptor).st_size
            if size > limit:
                raise DataError(f"{path} has {size:,} bytes, more than the limit of {limit:,}: check the path.")
            with os.fdopen(os.dup(descriptor), "rb") as file:
                return file.read(size)
    except FileNotFoundError:
        raise DataError(f"{path} does not exist: check the path.") from None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {_reason(error)}.") from error


@contextlib.contextmanager
def open_regular(path: Path) -> Iterator[int]:
    """Open a regular file and yield a descriptor for reading.

    Raises:
        OSError: it cannot be opened, or is not a regular file.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "it is not a regular file")
        yield descriptor
    finally:
        os.close(descriptor)


def sha256(path: Path) -> str:
    """Return the SHA-256 of a regular file, in hexadecimal."""
    with open_regular(path) as descriptor, os.fdopen(os.dup(descriptor), "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest(values: Mapping[str, Any]) -> str:
    """Return the SHA-256 of `values` as UTF-8 JSON with sorted keys and no spaces."""
    text = json.dumps(values, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def seal(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return `values` with their digest as the last entry."""
    return {**values, "digest": digest(values)}


def unseal(values: Mapping[str, Any]) -> dict[str, Any]:
    """Verify and remove the digest that `seal` added.

    Raises:
        DataError: the digest is missing or does not match.
    """
    content = {name: value for name, value in values.items() if name != "digest"}
    if values.get("digest") != digest(content):
        raise DataError("its digest does not match.")
    return content


def size(folder: Path) -> int:
    """Return the total size in bytes of all files below `folder`."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def sync(path: Path) -> None:
    """Flush a file or a folder entry to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove(path: Path) -> None:
    """Remove a file or a folder, if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def discard(path: Path) -> None:
    """Remove a file, if it exists.

    Raises:
        StorageError: it cannot be removed.
    """
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise StorageError(f"cannot remove {path}: {_reason(error)}.") from error


def _settle(new: Path, private: bool) -> None:
    """Set the mode of the new file or folder, and flush it to the disk."""
    for path in (*(new.rglob("*") if new.is_dir() else ()), new):
        if private and not path.is_symlink():
            path.chmod(PRIVATE if path.is_dir() else PRIVATE_FILE)
        sync(path)


def _put_back(path: Path, old: Path) -> None:
    """Move `old` back to `path`, unless `path` exists."""
    if os.path.lexists(path) or not os.path.lexists(old):
        return
    try:
        old.rename(path)
    except OSError as error:
        raise StorageError(
            f"cannot replace {path}: {_reason(error)}. The previous content is in {old}: move it back."
        ) from error


def _empty(folder: Path) -> None:
    for path in folder.iterdir():
        remove(path)


def _refused(path: Path, error: OSError | SafetensorError) -> StorageError:
    return StorageError(f"cannot write {path}: {_reason(error)}. Nothing was changed there.")


def _reason(error: OSError | SafetensorError) -> str:
    if isinstance(error, SafetensorError):  # the library writes files itself, and reports the system's error by number
        number = re.search(r"\(os error (\d+)\)", str(error))
        return os.strerror(int(number[1])) if number else str(error)
    return str(error.strerror or error)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise ValueError(f"{twice[:40]!r} occurs twice in one object")
    return value


def _constant(word: str) -> float:
    raise ValueError(f"{word} is not a JSON number")


def _finite(text: str) -> float:
    value = float(text)
    if value in (float("inf"), float("-inf")):
        raise ValueError(f"{text[:40]} is too large a number")
    return value
