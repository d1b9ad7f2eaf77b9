"""GGUF files as PLMs: each is converted once to a folder of transformers, which is kept in the cache.

A converted file is complete or absent. Its name is made of the SHA-256 of the GGUF file and of what the conversion
depends on; its manifest has the SHA-256 of every file in it, which are verified at each start, so that a damaged copy
is replaced.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

from pema.cache import VARIABLE, cache_folder
from pema.console import note
from pema.errors import DataError, OwnerError, StorageError
from pema.extras import installs
from pema.files import digest, read_json, seal, sha256, unseal, write_json, writing
from pema.locks import locked

REVISION = 1
"""To be raised when this package converts the same file to something else."""

MANIFEST = "converted.json"
MODEL_FILE = "model.gguf"

NEEDED = ("gguf", "accelerate")
"""Packages that transformers imports to read a GGUF file."""


def converted(
    name: str, parts: Callable[[], Sequence[Path]], expected: str | None = None, *, head_only: bool = False
) -> tuple[str, str, str]:
    """Return a GGUF file as a folder of transformers, from the cache or converted now.

    Args:
        name: name of the PLM.
        parts: finds the file, or its parts in order; not called if the cache has a file with the `expected` content.
        expected: SHA-256 of the file; None means that it is not known.
        head_only: whether the folder contains the LM head and the tokenizer only; see `extraction`.

    Returns:
        The folder, the name, and a line on the weights.

    Raises:
        OwnerError: the file cannot be read or converted, or has another content than expected.
        StorageError: the cache cannot be written.
    """
    files: Sequence[Path] = ()
    content = expected
    if content is None:
        files = parts()
        content = require_whole(files[0])
    folder = cache_folder() / "gguf" / f"{_key(content)}{'-head' if head_only else ''}"
    weights = _verified(folder)
    if weights is None:
        files = files or parts()
        _require_packages(name)
        with _alone(folder):
            weights = _verified(folder)
            if weights is None:
                if folder.exists():
                    note(f"the converted GGUF file in {folder} is damaged: it is converted again.")
                weights = _convert(name, files, content, folder, head_only)
    return str(folder), name, weights


def joined(name: str, parts: Sequence[Path], content: str) -> Path:
    """Return a GGUF file in one piece, in the cache if it is distributed in several.

    Args:
        name: name of the PLM.
        parts: the file, or its parts in order.
        content: SHA-256 of the file.

    Raises:
        OwnerError: it has another content.
        StorageError: the cache cannot be written.
    """
    if len(parts) == 1:
        return parts[0]
    whole = cache_folder() / "gguf" / f"{content[:32]}.gguf"
    if not whole.exists() or sha256(whole) != content:
        with _alone(whole), writing(whole) as new:
            _join(name, parts, content, new)
    return whole


def _join(name: str, parts: Sequence[Path], content: str, path: Path) -> None:
    with path.open("wb") as whole:
        for part in parts:
            with part.open("rb") as opened:
                shutil.copyfileobj(opened, whole, 1 << 22)
    if sha256(path) != content:
        raise _other_content(name, parts, content)


def _other_content(name: str, parts: Sequence[Path], content: str) -> OwnerError:
    packages = ", ".join(map(str, parts))
    return OwnerError(f"{name} differs from the tested file: SHA-256 {content[:12]} expected of {packages}.")


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Wait until no other process converts the same file, and keep others waiting while the block runs.

    Raises:
        StorageError: the cache cannot be written.
    """
    lock = folder.with_name(f"{folder.name}.lock")
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(locked(lock))
        except OSError as error:
            raise StorageError(
                f"cannot write the converted GGUF file to {folder.parent}: {error.strerror or error}. Set {VARIABLE} "
                "to a folder that can be written."
            ) from error
        try:
            yield
        finally:
            shutil.rmtree(lock, ignore_errors=True)


def require_whole(path: Path) -> str:
    """Return the SHA-256 of a file that is a GGUF file, and not one part of a split one.

    Raises:
        OwnerError: it is something else, or cannot be read.
    """
    try:
        with path.open("rb") as file:
            magic = file.read(4)
        if magic == b"GGUF" and not re.search(r"-\d{5}-of-\d{5}\.gguf$", path.name.lower()):
            return sha256(path)
    except OSError as error:
        raise OwnerError(f"{path} cannot be read: {error.strerror or error}.") from error
    if magic != b"GGUF":
        raise OwnerError(f"{path} is not a GGUF file: it does not start with 'GGUF'. Download it again.")
    raise OwnerError(
        f"{path} is one part of a split GGUF file: join the parts with `llama-gguf-split --merge`, and give the result."
    )


def _require_packages(name: str) -> None:
    missing = [package for package in NEEDED if find_spec(package) is None]
    if missing:
        raise OwnerError(f"{name} is a GGUF file, which needs {' and '.join(missing)}: {installs('gguf')}.")


def _key(content: str) -> str:
    """Return the name of a converted file; another version of transformers may convert it to something else."""
    maker = digest({"transformers": importlib.metadata.version("transformers"), "revision": REVISION})
    return f"{content[:32]}-{maker[:12]}"


def _verified(folder: Path) -> str | None:
    """Return the line on the weights of a converted file if all of it is there, else None."""
    try:
        manifest = unseal(read_json(folder / MANIFEST))
        return str(manifest["weights"]) if manifest["files"] == _checksums(folder) else None
    except (DataError, OSError, KeyError):
        return None


def _checksums(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.iterdir() if path.name != MANIFEST)
    with ThreadPoolExecutor() as pool:  # hashing releases the interpreter's lock
        return dict(zip([path.name for path in files], pool.map(sha256, files), strict=True))


def _convert(name: str, files: Sequence[Path], content: str, folder: Path, head_only: bool) -> str:
    from pema.owner.sources import conversion, extraction

    kept = f"it is kept in {folder.parent} (${VARIABLE} chooses another place)."
    what = "reading the LM head and the tokenizer in" if head_only else "converting"
    note(f"{what} the GGUF file of {name}, once; {kept}")
    with writing(folder) as new:
        # In a folder of its own, so that transformers reads nothing that lies beside the file.
        source = new.with_name("source") / MODEL_FILE
        source.parent.mkdir()
        if len(files) == 1:
            source.symlink_to(files[0].resolve())
            if sha256(source) != content:
                raise _other_content(name, files, content)
        else:
            _join(name, files, content, source)
        new.mkdir()
        weights = (extraction.extract if head_only else conversion.convert)(source, new, name)
        write_json(
            new / MANIFEST, seal({"name": name, "sha256": content, "weights": weights, "files": _checksums(new)})
        )
    return weights
