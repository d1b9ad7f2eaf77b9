"""One folder in object storage, with retries of what passes and one kind of error for what does not."""

from __future__ import annotations

import errno
import hashlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from pema.errors import ConfigError, StorageError
from pema.extras import installs
from pema.storage.address import ADDRESS, credentials, shown
from pema.storage.artifact import Artifact

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

T = TypeVar("T")

ATTEMPTS = 5
"""Maximum number of attempts of one request."""

PAUSE = 0.5
"""Seconds before the second attempt; each further pause is twice as long."""

CHUNK = 1 << 24
"""Bytes per request while a file is read."""

EXTRAS = {"s3": "s3", "s3a": "s3"}
"""The extra whose packages a protocol needs."""

LASTING = (
    FileExistsError,
    PermissionError,
    IsADirectoryError,
    NotADirectoryError,
    ImportError,
    NotImplementedError,
    TypeError,
    ValueError,
)
LASTING_NUMBERS = {errno.EINVAL, errno.ENOSPC, errno.ENOSYS, errno.EROFS}

NO_BUCKET = "bucket does not exist"
"""What S3 and Google Cloud Storage say of a missing bucket; to fsspec it is a missing file like any other."""

CREDENTIALS = "give credentials that allow it in the environment (docs/storage.md)."


class Remote:
    """A folder of files behind an address.

    Attributes:
        shown: the address without credentials, for messages.
    """

    def __init__(self, address: str) -> None:
        """Connect to the storage of an address; no request is sent.

        Raises:
            ConfigError: an impossible address, or the library for its protocol is not installed.
        """
        self.shown = shown(address)
        self._credentials = credentials(address)
        self._files, root = self._connect(address)
        self._root = root.rstrip("/")
        if not self._root:
            raise ConfigError(f"{self.shown} names no folder: give an address like s3://bucket/folder.")
        if self._credentials and self._credentials in self._root:
            raise ConfigError(f"{self.shown} was given with credentials, which have no effect there: {CREDENTIALS}")

    def _connect(self, address: str) -> tuple[AbstractFileSystem, str]:
        from fsspec.core import url_to_fs

        match = ADDRESS.match(address)
        protocol = "" if match is None else match["protocol"]
        if "?" in address:
            raise ConfigError(f"{self.shown.partition('?')[0]} was given with a query (?...): give the folder alone.")
        # Only local folders have to exist before a file is written into them.
        options: dict[str, Any] = {"auto_mkdir": True} if protocol in ("file", "local") else {}
        try:
            files, root = url_to_fs(address, **options)
            files.invalidate_cache()  # fsspec shares an instance with everything else in the process
        except ImportError as error:
            how = installs(EXTRAS[protocol]) if protocol in EXTRAS else str(error)
            raise ConfigError(f"{self.shown} needs a library that is not installed: {how}.") from None
        except ValueError as error:
            raise ConfigError(
                f"{self.shown} cannot be used as an address ({self._reason(error)}): use s3://, gs://, hf:// or "
                "another protocol of fsspec."
            ) from None
        except Exception as error:
            raise self._refused("opened", "", error, attempts=1) from None
        return files, root

    def index(self, artifact: Artifact) -> bytes:
        """Return the content of an artifact's index.

        Raises:
            PemaError: there is no such artifact; as `Artifact.error` says.
            StorageError: it cannot be read.
        """
        content = self.read(artifact.index, artifact.limit)
        if content is None:
            self.names()  # refuses a bucket that does not exist
            raise artifact.error(
                f"{self.shown} contains no {artifact.name} (it has no {artifact.index}): check the address."
            )
        return content

    def read(self, file: str, limit: int) -> bytes | None:
        """Return the content of a small file; None if it does not exist."""
        size = self.size(file)
        if size is None:
            return None
        if size > limit:
            raise StorageError(f"{self.shown}/{file} has {size:,} bytes, more than the limit of {limit:,}.")
        content: bytes | None = self._try("read", file, lambda path: self._files.cat_file(path))
        return content

    def size(self, file: str) -> int | None:
        """Return the size of a file in bytes; None if it does not exist."""
        entry = self._try("read", file, lambda path: self._files.info(path))
        return None if entry is None or entry["type"] != "file" else int(entry["size"])

    def names(self) -> list[str]:
        """Return the paths of all files in the folder.

        Raises:
            StorageError: the bucket does not exist.
        """
        paths = self._try("listed", "", lambda path: self._files.find(path)) or []
        return [str(path).removeprefix(self._root).lstrip("/") for path in paths]

    def require_room(self, artifact: Artifact) -> None:
        """Refuse a folder without the artifact that contains files which are not part of one; hidden files may be.

        Raises:
            StorageError: there are others, or the bucket does not exist.
        """
        others = [name for name in self.names() if not artifact.files.fullmatch(name) and not name.startswith(".")]
        if others and artifact.index not in others:
            raise StorageError(
                f"{self.shown} contains {others[0]!r} but no {artifact.name}: choose another address for the "
                f"{artifact.name}."
            )

    def chunks(self, file: str, start: int, size: int) -> Iterator[bytes]:
        """Yield the content of a file of `size` bytes from byte `start` on; what was yielded is not read again.

        Raises:
            StorageError: it cannot be read, or is shorter.
        """
        while start < size:
            stop = min(start + CHUNK, size)
            chunk = self._try("read", file, lambda path, start=start, stop=stop: self._piece(path, start, stop))
            if chunk is None:
                raise StorageError(f"{self.shown}/{file} is missing: upload it again from a copy.")
            start += len(chunk)
            yield chunk

    def _piece(self, path: str, start: int, stop: int) -> bytes:
        piece: bytes = self._files.cat_file(path, start=start, end=stop)
        if not 0 < len(piece) <= stop - start:
            raise ConnectionError(f"{len(piece):,} of {stop - start:,} bytes arrived")
        return piece

    def sha256(self, file: str, size: int) -> str:
        """Return the SHA-256 of a file of `size` bytes, in hexadecimal; every byte is read."""
        digest = hashlib.sha256()
        for chunk in self.chunks(file, 0, size):
            digest.update(chunk)
        return digest.hexdigest()

    def put(self, path: Path, file: str) -> None:
        """Upload a local file."""
        self._try("written", file, lambda to: self._files.put_file(str(path), to))

    def _try(self, done: str, file: str, call: Callable[..., T]) -> T | None:
        """Return the result of a request, repeated while its error may pass; None if there is no such file."""
        path = f"{self._root}/{file}".rstrip("/")
        attempt = 1
        while True:
            try:
                return call(path)
            except FileNotFoundError as error:
                if done == "written" or NO_BUCKET in str(error):  # no file is read here, so it is the bucket
                    raise self._refused(done, file, error, 1) from None
                return None
            except Exception as error:  # each library has its own
                if attempt == ATTEMPTS or not _passes(error):
                    raise self._refused(done, file, error, attempt) from None
            time.sleep(PAUSE * 2 ** (attempt - 1))
            attempt += 1

    def _refused(self, done: str, file: str, error: Exception, attempts: int) -> StorageError:
        if isinstance(error, PermissionError) or _lacks_credentials(error):
            remedy = CREDENTIALS
        elif attempts > 1:
            remedy = f"it was tried {attempts} times; the same command continues once the storage answers."
        else:
            remedy = "check the address."
        where = f"{self.shown}/{file}".rstrip("/")
        return StorageError(f"{where} cannot be {done} ({self._reason(error)}): {remedy}")

    def _reason(self, error: Exception) -> str:
        """Return what an error says, in one line and without credentials."""
        text = " ".join(str(error).split())
        if self._credentials:
            for secret in (self._credentials, self._credentials.partition(":")[2]):
                text = text.replace(secret, "...") if secret else text
        return f"{type(error).__name__}: {text[:300]}".removesuffix(": ").rstrip(".")


def _passes(error: Exception) -> bool:
    """Return whether a request that failed may succeed later."""
    number = getattr(error, "errno", None)
    return not (isinstance(error, LASTING) or number in LASTING_NUMBERS or _lacks_credentials(error))


def _lacks_credentials(error: Exception) -> bool:
    return "Credential" in type(error).__name__  # botocore's and google.auth's are subclasses of Exception only
