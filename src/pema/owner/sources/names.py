"""Names of PLMs: what each leads to."""

from __future__ import annotations

import difflib
import os
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from pema.errors import OwnerError
from pema.owner.sources.gguf import converted, joined
from pema.owner.sources.hub import require_on_hub
from pema.owner.sources.packaged import PACKAGED, packaged_files

CAUSAL = "a causal language model"
EMBEDDED = "embedded"
EMBEDDED_FOLDER = "tatoeba-en-de-9m"

STARTED, RUNNING = "llamacpp:", "llamacpp+"
"""Beginnings of the names of PLMs that llama.cpp runs: in a server that is started, and in a running one."""

LOGPROBS = "logprobs+"
"""Beginning of the names of PLMs whose API returns log-probabilities."""

VLLM, SGLANG = "vllm+", "sglang+"
"""Beginnings of the names of PLMs on a running server of vLLM or SGLang that gives vectors."""


@dataclass(frozen=True)
class Source:
    """Location from which transformers loads a PLM.

    Attributes:
        place: hub name or folder.
        name: name of the PLM (never an absolute path).
        weights: how the weights were quantised and what they were widened to; empty for a checkpoint of transformers.
    """

    place: str
    name: str
    weights: str = ""


def resolve(name: str | Path) -> Source:
    """Find a PLM by its name; a GGUF file is converted at its first use.

    Raises:
        OwnerError: a folder or file does not exist or contains no model, a package is missing, or it is an address.
        StorageError: the converted GGUF file cannot be written to the cache.
    """
    text = str(name)
    if text == EMBEDDED:
        folder = Path(str(resources.files("pema"))) / "plm" / EMBEDDED_FOLDER
        if not (folder / "config.json").is_file():
            raise OwnerError(
                "the embedded PLM is not part of this installation: install the wheel, or give a hub name or a folder."
            )
        return Source(str(folder), EMBEDDED_FOLDER)
    if text in PACKAGED:
        return Source(*converted(text, lambda: packaged_files(text), PACKAGED[text].sha256))
    if text.startswith(("http://", "https://", RUNNING, LOGPROBS, VLLM, SGLANG)):
        raise OwnerError(
            f"{text} is the address of a server, and this needs the PLM itself: give a folder, GGUF file or hub name."
        )
    if text.startswith(STARTED):
        raise OwnerError(
            f"{text} is run by llama.cpp, and this needs the PLM itself: give {text.removeprefix(STARTED)}, which "
            "transformers runs."
        )
    path = Path(text).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            files = sorted(file.name for file in path.glob("*.gguf"))
            advice = f"the GGUF file itself: {path / files[0]}" if files else "the folder that has it, or a hub name"
            raise OwnerError(f"the folder {text} contains no config.json of a transformers model. Give {advice}.")
        return Source(str(path), path.resolve().name)
    found = gguf_file(text)
    if found is not None:
        return Source(*converted(found[0], lambda: [found[1]]))
    if path.exists():
        raise OwnerError(
            f"{text} is not a PLM: give the folder of a transformers model, a GGUF file (.gguf), or a hub name."
        )
    if path.is_absolute() or text.startswith((".", "~")) or text.count("/") > 1 or (os.sep != "/" and os.sep in text):
        raise OwnerError(f"the folder {text} does not exist: check the path, or give a hub name.")
    return Source(text, text)


def gguf_file(name: str) -> tuple[str, Path] | None:
    """Find the GGUF file with a path, or that of a packaged PLM: return the name of the PLM and the file.

    Returns:
        None if the path is not that of a GGUF file.

    Raises:
        OwnerError: the path ends in .gguf and does not exist, or a package is missing.
        StorageError: the parts of a file cannot be joined in the cache.
    """
    if name in PACKAGED:
        return name, joined(name, packaged_files(name), PACKAGED[name].sha256)
    path = Path(name).expanduser()
    if path.suffix.lower() != ".gguf" or path.is_dir():
        return None
    if not path.exists():
        raise OwnerError(f"the GGUF file {name} does not exist: check the path{_near(name, _beside(path))}.")
    return path.stem, path


def require_model(name: str | Path, what: str, revision: str | None = None) -> None:
    """Refuse a name that leads to no model, without loading torch; a GGUF file is converted at its first use.

    Args:
        name: the name; see `resolve`.
        what: kind of model, with its article, for the message.
        revision: revision of the hub's repository.

    Raises:
        OwnerError, StorageError: see `resolve`, and there is no such model on the hub or in its cache.
    """
    place = resolve(name).place
    if not Path(place).is_dir():
        require_on_hub(place, what, known_names(place), revision)


def known_names(name: str) -> str:
    """Return the advice for a name that leads nowhere: the names that pema knows; empty for a hub name or a path."""
    if "/" in name:
        return ""
    names = [*PACKAGED, EMBEDDED]
    return f" pema itself knows {', '.join(names)}{_near(name, names)}."


def _near(name: str, names: list[str]) -> str:
    near = difflib.get_close_matches(name, names, n=1)
    return f" (did you mean {near[0]}?)" if near else ""


def _beside(path: Path) -> list[str]:
    """Return the GGUF files in the folder of a missing one."""
    return [str(file) for file in path.parent.glob("*.gguf")] if path.parent.is_dir() else []
