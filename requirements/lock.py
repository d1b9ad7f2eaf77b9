"""Resolve the tested set of packages and write it with hashes: `python requirements/lock.py`.

uv resolves once for every platform and Python; pip installs from three files, since builds of torch differ in what they
need beside them:

- `torch.txt`: torch alone. Its hashes are those of the package index, and of the build that pip takes on this machine.
- `cuda.txt`: what a CUDA build of torch imports. A CPU build needs none of it.
- `locked.txt`: everything else.
"""

from __future__ import annotations

import hashlib
import re
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
HEAD = "# Made by `make lock`; do not edit.\n"
ACCELERATOR = re.compile(r"(cuda|nvidia)-|triton$")


def main() -> None:
    """Write the three files."""
    blocks = resolve()
    torch = blocks.pop("torch")
    version = torch.split("==")[1].split()[0]
    local = local_hash(version)
    if local not in torch:
        torch = f"{torch.rstrip()} \\\n    --hash=sha256:{local}\n"
    cuda = {name: block for name, block in blocks.items() if ACCELERATOR.match(name)}
    rest = {name: block for name, block in blocks.items() if name not in cuda}
    for name, text in {"torch": torch, "cuda": "".join(cuda.values()), "locked": "".join(rest.values())}.items():
        (HERE / f"{name}.txt").write_text(HEAD + text, encoding="utf-8")


def resolve() -> dict[str, str]:
    """Each package's lines of uv's universal resolution, by name; a package may have several versions."""
    command = ["uv", "pip", "compile", "--quiet", "--universal", "--generate-hashes", "--no-annotate", "--no-header"]
    command += ["--python-version", "3.11", "--all-extras", "--group", "dev", "--upgrade", "pyproject.toml"]
    text = subprocess.run(
        [str(Path(sys.executable).parent / command[0]), *command[1:]],
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


def local_hash(version: str) -> str:
    """SHA-256 of the build of torch that pip takes on this machine."""
    with tempfile.TemporaryDirectory() as folder:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder]
        subprocess.run([*pip, f"torch=={version}"], check=True)
        (wheel,) = Path(folder).glob("torch-*.whl")
        with wheel.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()


if __name__ == "__main__":
    main()
