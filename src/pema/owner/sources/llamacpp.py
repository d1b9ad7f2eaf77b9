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
    """Return whether a name is that of a PLM that llama.cpp runs."""
    return name.startswith((STARTED, RUNNING))


def is_api(name: str) -> bool:
    """Return whether a name is that of a PLM whose API returns log-probabilities."""
    return name.startswith(LOGPROBS)


def behind_api(name: str) -> Served:
    """Parse the name of a PLM whose API returns log-probabilities, and find the folder with its head.

    Raises:
        ConfigError: the name has another form.
        OwnerError: the folder does not exist.
    """
    url, _, given = name.removeprefix(LOGPROBS).partition("#")
    if not url.startswith(SCHEMES):
        raise ConfigError(f"{name} is not the address of an API: give {LOGPROBS}http://host:port#FOLDER.")
    folder = Path(given).expanduser()
    if not given or not folder.is_dir():
        where = f"the folder {given} does not exist" if given else f"{name} does not say where the LM head is"
        raise OwnerError(
            f"{where}: append # and the folder that `pema recover {url} -o FOLDER` wrote, or one with the released "
            "head bundle and the tokenizer's files."
        )
    return Served(folder.resolve().name, folder, url)


def is_engine(name: str) -> bool:
    """Return whether a name is that of a PLM on a server of vLLM or SGLang."""
    return name.startswith((VLLM, SGLANG))


def behind_engine(name: str) -> Served:
    """Parse the name of a PLM on a server of vLLM or SGLang, and find what its LM head is read from.

    Raises:
        ConfigError: the name has another form.
        OwnerError: the file or folder does not exist, or contains no model.
    """
    begin = VLLM if name.startswith(VLLM) else SGLANG
    url, _, given = name.removeprefix(begin).partition("#")
    if not url.startswith(SCHEMES):
        raise ConfigError(f"{name} is not the address of a server: give {begin}http://host:port#FOLDER.")
    if not given:
        raise ConfigError(
            f"{name} does not say where the LM head is: append # and a folder with the released head bundle and the "
            "tokenizer's files, the model's folder, or its GGUF file."
        )
    folder = Path(given).expanduser()
    if folder.is_dir():
        return Served(folder.resolve().name, folder, url)
    found = gguf_file(given)
    if found is None:
        raise OwnerError(
            f"the folder {given} does not exist: give one with the released head bundle and the tokenizer's files, the "
            "model's folder, or its GGUF file."
        )
    return Served(*found, url)


def served(name: str) -> Served:
    """Parse the name of a PLM that llama.cpp runs, and find its file.

    Raises:
        ConfigError: the name has another form.
        OwnerError: the file or folder does not exist, or is no GGUF file and no head bundle.
    """
    if name.startswith(STARTED):
        given = name.removeprefix(STARTED)
        if given.startswith(SCHEMES):
            raise ConfigError(f"{name} starts a server for a GGUF file: for one that runs, give {RUNNING}{given}#FILE.")
        return _gguf(name, given, None)
    url, _, given = name.removeprefix(RUNNING).partition("#")
    if not url.startswith(SCHEMES):
        raise ConfigError(f"{name} is not the address of a server: give {RUNNING}http://host:port#FILE.")
    if not given:
        raise ConfigError(
            f"{name} does not say where the LM head is: append # and the server's GGUF file, or a folder with the "
            "released head bundle and the tokenizer's files."
        )
    folder = Path(given).expanduser()
    if folder.is_dir():
        return Served(folder.resolve().name, folder, url)
    return _gguf(name, given, url)


def _gguf(name: str, given: str, url: str | None) -> Served:
    found = gguf_file(given)
    if found is None:
        raise OwnerError(f"{name} names no GGUF file: llama.cpp runs files that end in .gguf, and packaged PLMs.")
    return Served(*found, url, PACKAGED[given].sha256 if given in PACKAGED else None)
