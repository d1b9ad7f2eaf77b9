"""Writing to object storage: the work is done on the local disk, and uploaded once it is complete."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

from pema import console
from pema.errors import StorageError
from pema.files import read_bytes, remove, sha256, writing
from pema.locks import exclusive
from pema.storage.address import is_address, joined, name_of
from pema.storage.artifact import Artifact
from pema.storage.cache import cached, snapshot, storage_folder
from pema.storage.fetching import fetch
from pema.storage.remote import Remote


@contextlib.contextmanager
def destination(
    place: str | Path, contents: Artifact | Mapping[str, Artifact], *, anew: bool = False
) -> Iterator[Path]:
    """Yield the local folder to write to; if `place` is an address, publish what it contains when the block ends.

    For a local path this is the path itself, and nothing else happens. For an address it is a folder in the cache, of
    this address alone. If the block or the upload fails or is killed, the folder is kept: the next `destination` of
    the address yields it again. It is removed once everything in it is published.

    Args:
        place: a local path, or an address.
        contents: what the block writes, or the folders in it and what it writes there; those that are not written are
            left out.
        anew: whether the block writes everything: then it begins with an empty folder. If not, it begins with what an
            earlier block left, or else with what is at the address.

    Raises:
        StorageError: the address cannot be read or written, contains something else, or another process writes to it;
            what the block wrote is kept, and the message says where.
    """
    if not is_address(place):
        yield Path(place)
        return
    address, kinds = str(place), {"": contents} if isinstance(contents, Artifact) else contents
    remote = Remote(address)
    with cached(remote.shown):
        work = storage_folder("work") / hashlib.sha256(remote.shown.rstrip("/").encode()).hexdigest()[:32]
        folder = work / ("new" if anew else "kept") / name_of(address)
    with exclusive(work, private=True):
        for name, artifact in kinds.items():
            Remote(str(joined(address, name))).require_room(artifact)
        if anew:
            remove(folder)
        for name, artifact in kinds.items():
            if not anew and not (folder / name).exists():
                _begin_with(str(joined(address, name)), artifact, folder / name)
        console.note(f"{remote.shown} is written once the work in {folder} is complete.")
        yield folder
        with console.keeping(f"what is written is kept in {folder}: the same command continues with it"):
            for name, artifact in kinds.items():
                if (folder / name / artifact.index).exists():
                    publish(folder / name, str(joined(address, name)), artifact)
        remove(folder.parent)
        with contextlib.suppress(OSError):
            work.rmdir()


def publish(folder: Path, address: str, artifact: Artifact) -> None:
    """Upload an artifact: first its files, each read back and compared, then its index, which makes it exist.

    Files that are there already are not uploaded again, so the same call continues one that was interrupted.

    Args:
        folder: the artifact; complete, and not changed by another process.
        address: folder in object storage.
        artifact: what it is.

    Raises:
        PemaError: `folder` contains no such artifact, or a damaged one.
        StorageError: the address contains another artifact or other files; an upload failed, or arrived damaged.
    """
    remote = Remote(address)
    index = read_bytes(folder / artifact.index, artifact.limit)
    parts = artifact.parts(index, str(folder))
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    names = {name: path for path in files if artifact.files.fullmatch(name := path.relative_to(folder).as_posix())}
    digests = {name: sha256(path) for name, path in names.items()}
    for part in parts:
        if digests.get(part.file) != part.sha256:
            raise artifact.error(
                f"{folder / part.file} is missing or damaged (its SHA-256 differs), so nothing was published: remove "
                f"{folder}, and write it again."
            )
    remote.require_room(artifact)
    stored = remote.read(artifact.index, artifact.limit)
    # The beginning of this index is what an interrupted upload leaves where files do not appear as a whole.
    if stored is not None and not index.startswith(stored) and not artifact.follows(stored, index):
        raise StorageError(
            f"{remote.shown} already contains another {artifact.name}: choose another address, or remove it there. "
            f"What was written for it is kept in {folder}."
        )
    with console.progress("publishing", sum(path.stat().st_size for path in names.values()), "bytes") as advance:
        for name, path in names.items():
            # Where the index is, every file was compared before it; only a file that was lost since is missing.
            _upload(remote, path, name, digests[name], trusted=stored == index)
            advance(path.stat().st_size)
    if stored != index:
        _upload(remote, folder / artifact.index, artifact.index, hashlib.sha256(index).hexdigest())
    with cached(remote.shown):
        snapshot(index, artifact, parts, lambda part, to: _link(folder / part.file, to))


def _upload(remote: Remote, path: Path, name: str, digest: str, *, trusted: bool = False) -> None:
    """Upload a file unless it is there, and compare what arrived; a `trusted` file is compared by its size alone."""
    size = path.stat().st_size
    if remote.size(name) == size and (trusted or remote.sha256(name, size) == digest):
        return
    remote.put(path, name)
    if remote.size(name) != size or remote.sha256(name, size) != digest:
        raise StorageError(
            f"{remote.shown}/{name} is not what was uploaded (size or SHA-256 differs): run the same command again; "
            "if another process writes to this address, choose another."
        )


def _begin_with(address: str, artifact: Artifact, folder: Path) -> None:
    """Put a copy of the artifact at an address, if there is one, into `folder`."""
    if Remote(address).size(artifact.index) is not None:
        # Files in the cache and in the folder are the same; both are only ever replaced, never changed.
        with writing(folder) as new:
            shutil.copytree(fetch(address, artifact), new, copy_function=os.link)


def _link(path: Path, to: Path) -> None:
    to.unlink(missing_ok=True)
    os.link(path, to)
