"""Files that are whole or absent: everything is written under a temporary name, synced, then renamed."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pema.errors import DataError, StorageError

TEMPORARY = ".partial"


@contextlib.contextmanager
def writing(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path` and rename it to `path` when the block ends without an error.

    Works for a file that the block writes and for a folder that it makes. What stood at `path` before stays until the
    rename. A left-over temporary of a killed run is removed first.

    Raises:
        StorageError: the disk is full or the path cannot be written; nothing changed at `path`.
    """
    temporary = path.with_name(path.name + TEMPORARY)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        remove(temporary)
        yield temporary
        if temporary.is_dir():
            for child in temporary.rglob("*"):
                sync(child)
            sync(temporary)
            if path.is_dir():
                remove(path)
        else:
            sync(temporary)
        temporary.replace(path)
        sync(path.parent)
    except BaseException as error:
        with contextlib.suppress(OSError):
            remove(temporary)
        if isinstance(error, OSError) and not isinstance(error, StorageError):
            raise _refused(path, error) from error
        raise


@contextlib.contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Make the folder and keep every other process that asks for it out while the block runs.

    The lock is the system's and ends with the process, however it ends; nothing of it stays in the folder. A folder
    that was made for the block and is empty when it ends is removed.

    Raises:
        StorageError: another process works in the folder, or it cannot be made.
    """
    new = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise _refused(folder, error) from error
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise StorageError(f"another process works in {folder}: wait until it has ended.") from None
        yield
    finally:
        os.close(descriptor)
        if new:
            with contextlib.suppress(OSError):
                folder.rmdir()


def create(path: Path, content: bytes) -> bool:
    """Write a new file that its owner alone may read, whole or not at all.

    Of several processes that create the same file one succeeds, and what it wrote stays.

    Returns:
        False where the file exists; it is left as it is.

    Raises:
        StorageError: the file cannot be written; nothing changed at `path`.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # mkstemp opens with mode 0600, so no moment passes in which others may read.
        descriptor, name = tempfile.mkstemp(prefix=path.name, suffix=TEMPORARY, dir=path.parent)
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            # Where a rename would replace what another process has just written, a link is refused.
            os.link(name, path)
        finally:
            Path(name).unlink()
        sync(path.parent)
    except FileExistsError:
        return False
    except OSError as error:
        raise _refused(path, error) from error
    return True


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write `value` as indented JSON, whole or not at all."""
    with writing(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        DataError: the file is missing, is not UTF-8 or does not hold a JSON object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"{path} does not exist: check the path.") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise DataError(f"{path} cannot be read as JSON: {error}.") from error
    if not isinstance(value, dict):
        raise DataError(f"{path} holds a JSON {type(value).__name__}, not an object.")
    return value


def sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def size(folder: Path) -> int:
    """Bytes of all files below `folder`."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def sync(path: Path) -> None:
    """Flush a file or a folder entry to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _refused(path: Path, error: OSError) -> StorageError:
    return StorageError(f"cannot write {path}: {error.strerror or error}. Nothing was changed there.")


def remove(path: Path) -> None:
    """Remove a file or a folder; nothing happens where there is none."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
