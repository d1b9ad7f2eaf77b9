"""Locks on folders: the system's, which end with the process that holds them, however it ends."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from pema.errors import StorageError

PRIVATE = 0o700
"""Mode of a folder that its owner alone may enter."""


@contextlib.contextmanager
def exclusive(folder: Path, *, private: bool = False) -> Iterator[None]:
    """Make the folder and keep every other process that asks for it out while the block runs.

    The lock is the system's and ends with the process, however it ends; nothing of it stays in the folder. A folder
    that was made for the block and is empty when it ends is removed.

    Args:
        folder: the folder.
        private: whether its owner alone may enter it, where it is made now.

    Raises:
        StorageError: another process works in the folder, or it cannot be made.
    """
    new = not folder.exists()
    with contextlib.ExitStack() as stack:
        try:
            busy = f"another process works in {folder}: wait until it has ended."
            stack.enter_context(locked(folder, busy, mode=PRIVATE if private else 0o777))
        except StorageError:
            raise
        except OSError as error:
            raise StorageError(
                f"cannot work in {folder}: {error.strerror or error}. Nothing was changed there."
            ) from error
        try:
            yield
        finally:
            if new:
                with contextlib.suppress(OSError):
                    folder.rmdir()


@contextlib.contextmanager
def locked(folder: Path, busy: str | None = None, mode: int = PRIVATE) -> Iterator[None]:
    """Make the folder and hold the system's lock on it; wait for it, or raise StorageError(busy) if that is given."""
    descriptor = None
    while descriptor is None:
        folder.mkdir(mode=mode, parents=True, exist_ok=True)
        descriptor = _lock(folder, busy)
    try:
        yield
    finally:
        os.close(descriptor)


def _lock(folder: Path, busy: str | None) -> int | None:
    """The descriptor that holds the lock; None where the folder went away with the writer who held it before."""
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (fcntl.LOCK_NB if busy else 0))
        if os.path.samestat(os.fstat(descriptor), folder.stat()):
            return descriptor
    except BlockingIOError:
        os.close(descriptor)
        raise StorageError(busy) from None
    except FileNotFoundError:
        pass
    except BaseException:
        os.close(descriptor)
        raise
    os.close(descriptor)
    return None
