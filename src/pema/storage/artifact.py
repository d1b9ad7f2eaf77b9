"""What is stored as a whole: files that an index names, and the index, which alone makes it exist."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pema.errors import PemaError


@dataclass(frozen=True)
class Part:
    """A file that an index names.

    Attributes:
        file: its path inside the folder.
        sha256: its SHA-256 in hexadecimal.
        bytes: its size; None if the index does not give it.
    """

    file: str
    sha256: str
    bytes: int | None = None


@dataclass(frozen=True)
class Artifact:
    """A kind of artifact: a memory, an adapter or a head bundle.

    Attributes:
        name: its name in messages.
        index: the file that names the others. It is uploaded last and downloaded first.
        limit: maximum size of the index in bytes.
        files: pattern of the files beside the index that belong to such an artifact.
        parts: returns the files that the content of an index names; the second argument is its place, for messages.
            It raises if the index is damaged, or that of an artifact that is not complete.
        follows: whether an artifact with the second index may replace one with the first, because no file that the
            first one names has another content.
        error: the exception for a place without such an artifact.
    """

    name: str
    index: str
    limit: int
    files: re.Pattern[str]
    parts: Callable[[bytes, str], Sequence[Part]]
    follows: Callable[[bytes, bytes], bool]
    error: type[PemaError]
