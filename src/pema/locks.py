"""Locks on folders by the operating system, which end with the process that holds them."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from pema.errors import StorageError

PRIVATE = 0o700
"""Mode of a folder that only its owner may enter."""


@contextlib.contextmanager
def exclusive(folder: Path, *, private: bool = False) -> Iterator[None]:
    """Create the folder and lock it exclusively while the block runs.

    The operating system releases the lock when the process ends, for whatever reason; no lock file is left. A folder
    that was created for the block and is empty at its end is removed.

    Args:
        folder: the folder.
        private: whether only its owner may enter it, if it is created here.

    Raises:
        StorageError: another process works in the folder, or it cannot be created.
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
    """Create the folder and lock it; wait for the lock, or raise StorageError(busy) if `busy` is given.

    A block may remove the folder as its last step: from then on the next process creates it anew and holds its lock.
    """
    descriptor = None
    while descriptor is None:
        try:
            folder.mkdir(mode=mode, parents=True, exist_ok=True)
        except FileExistsError:  # also if another process removed the folder after `mkdir` had found it
            if os.path.lexists(folder) and not folder.is_dir():
                raise
            continue
        descriptor = _lock(folder, busy)
    try:
        yield
    finally:
        os.close(descriptor)


def _lock(folder: Path, busy: str | None) -> int | None:
    """Return the descriptor that holds the lock; None if the previous writer has removed the folder."""
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
