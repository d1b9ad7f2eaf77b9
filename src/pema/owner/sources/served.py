"""Names of PLMs that another engine runs.

`llamacpp:MODEL` and `llamacpp+http://host:port#HEAD` are llama.cpp's, `vllm+http://host:port#HEAD` and
`sglang+http://host:port#HEAD` those of the engines with these names, `logprobs+http://host:port#HEAD` is an API that
returns log-probabilities.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pema.errors import ConfigError, OwnerError
from pema.owner.sources.names import LOGPROBS, RUNNING, SGLANG, STARTED, VLLM, gguf_file
from pema.owner.sources.packaged import PACKAGED

SCHEMES = ("http://", "https://")

RELEASED = "with the released head bundle and the tokenizer's files"
_ENGINE = f"a folder {RELEASED}, the model's folder, or its GGUF file"
HEADS = {
    RUNNING: f"the server's GGUF file, or a folder {RELEASED}",
    VLLM: _ENGINE,
    SGLANG: _ENGINE,
    LOGPROBS: f"the folder that `pema recover URL -o FOLDER` wrote, or one {RELEASED}",
}
"""What the LM head is read from, behind #, by the beginning of the name."""


@dataclass(frozen=True)
class Served:
    """A PLM that another engine runs.

    Attributes:
        name: name of the PLM.
        model: its GGUF file, or a folder with its head bundle and its tokenizer's files.
        url: address of a running server; None means that one is started.
        content: SHA-256 of the GGUF file, or None if it is not known.
    """

    name: str
    model: Path
    url: str | None
    content: str | None = None


def is_served(name: str) -> bool:
    """Return whether a name is that of a PLM that another engine runs."""
    return name.startswith((STARTED, *HEADS))


def served(name: str) -> Served:
    """Parse the name of a PLM that another engine runs, and find what its LM head is read from.

    Raises:
        ConfigError: the name has another form.
        OwnerError: the file or folder does not exist, or contains no model.
    """
    if name.startswith(STARTED):
        given = name.removeprefix(STARTED)
        if given.startswith(SCHEMES):
            raise ConfigError(f"{name} starts a server for a GGUF file: for one that runs, give {RUNNING}{given}#FILE.")
        file = _gguf(given, None)
        if file is None:
            raise OwnerError(f"{name} names no GGUF file: llama.cpp runs files that end in .gguf, and packaged PLMs.")
        return file
    begin = next(begin for begin in HEADS if name.startswith(begin))
    url, _, given = name.removeprefix(begin).partition("#")
    if not url.startswith(SCHEMES):
        raise ConfigError(f"{name} is not the address of a server: give {begin}http://host:port#HEAD.")
    if not given:
        raise ConfigError(f"{name} does not say where the LM head is: append # and {HEADS[begin]}.")
    folder = Path(given).expanduser()
    if folder.is_dir():
        return Served(folder.resolve().name, folder, url)
    file = None if begin == LOGPROBS else _gguf(given, url)
    if file is None:
        raise OwnerError(f"the folder {given} does not exist: give {HEADS[begin]}.")
    return file


def _gguf(given: str, url: str | None) -> Served | None:
    file = gguf_file(given)
    return None if file is None else Served(*file, url, PACKAGED[given].sha256 if given in PACKAGED else None)
