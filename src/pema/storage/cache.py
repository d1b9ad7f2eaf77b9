"""Files of artifacts on the local disk, named by their content and shared by all processes and artifacts."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from pema.cache import cache_folder
from pema.errors import StorageError
from pema.files import PRIVATE_FILE, TEMPORARY, remove, sha256, sync
from pema.locks import PRIVATE, locked
from pema.storage.artifact import Artifact, Part


def storage_folder(name: str) -> Path:
    """Return a folder of the cache that only its owner may read; it is created."""
    base = cache_folder() / "storage"
    for folder in (base, base / name):
        folder.mkdir(mode=PRIVATE, parents=True, exist_ok=True)
    return base / name


@contextlib.contextmanager
def cached(what: str) -> Iterator[None]:
    """Turn the system's errors in the block into errors of the cache."""
    try:
        yield
    except StorageError:
        raise
    except OSError as error:
        raise StorageError(
            f"{what} cannot be kept in {cache_folder()}: {error.strerror or error}. Make room there, or name another "
            "folder in PEMA_CACHE."
        ) from error


def snapshot(index: bytes, artifact: Artifact, parts: Sequence[Part], source: Callable[[Part, Path], None]) -> Path:
    """Return the folder of the artifact with this index: its files, each of them in the cache once.

    Args:
        index: content of its index.
        artifact: its kind.
        parts: the files that the index names.
        source: writes the content of a part that is not in the cache to a path. What it leaves there when it fails is
            there when it is called again.

    Raises:
        StorageError: the disk is full, or `source` cannot give a part.
    """
    folder = storage_folder("artifacts") / f"{artifact.name.replace(' ', '-')}-{hashlib.sha256(index).hexdigest()[:32]}"
    if not _is_complete(folder, parts):
        files = [_keep(part, source) for part in parts]
        with _making(folder, lambda: _is_complete(folder, parts)) as work:
            if work is not None:
                new = work / "new"
                remove(new)
                new.mkdir(mode=PRIVATE)
                for part, file in zip(parts, files, strict=True):
                    (new / part.file).parent.mkdir(mode=PRIVATE, parents=True, exist_ok=True)
                    os.link(file, new / part.file)
                (new / artifact.index).write_bytes(index)
                (new / artifact.index).chmod(PRIVATE_FILE)
                for path in (*new.rglob("*"), new):
                    sync(path)
                remove(folder)
                new.rename(folder)
                sync(folder.parent)
    return folder


def _keep(part: Part, source: Callable[[Part, Path], None]) -> Path:
    """Return the file with the content of a part, which `source` writes if it is not there."""
    path = storage_folder("files") / part.sha256
    with _making(path, lambda: _is_whole(path, part)) as work:
        if work is not None:
            data = work / "data"
            source(part, data)
            data.chmod(PRIVATE_FILE)
            sync(data)
            data.replace(path)
            sync(path.parent)
    return path


@contextlib.contextmanager
def _making(path: Path, is_there: Callable[[], bool]) -> Iterator[Path | None]:
    """Yield a work folder for `path`, or None if it is there; wait for another process that makes it.

    The work folder of a block that fails is kept, for the next one.
    """
    work = path.with_name(path.name + TEMPORARY)
    with locked(work):
        yield None if is_there() else work
        remove(work)


def _is_whole(path: Path, part: Part) -> bool:
    """Return whether a file of the cache is there, with its size; its content was verified when it arrived."""
    if not path.is_file():
        return False
    return path.stat().st_size == part.bytes if part.bytes is not None else sha256(path) == part.sha256


def _is_complete(folder: Path, parts: Sequence[Part]) -> bool:
    return folder.is_dir() and all(_is_whole(folder / part.file, part) for part in parts)
