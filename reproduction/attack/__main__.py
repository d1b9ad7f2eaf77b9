"""Attacks on server, client and files: `python -m reproduction.attack`.

`make attack` also writes the table of SECURITY.md.
They are bounded in time and in size, over the loopback only. The exit code is 1 if something fell.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from rich.console import Console

from pema.signature import signature
from reproduction.attack import client, server, workers
from reproduction.lines import put_run, read_runs
from reproduction.paths import ROOT
from reproduction.tables.attack import AFTER, FILE
from reproduction.tables.markdown import head, row

STDERR = Console(stderr=True, highlight=False)

FILES = {
    "Kills at every moment of a build and of a training": [
        "tests/memory/test_memory_resume.py",
        "tests/adapter/test_adapter_resume.py",
    ],
    "Full disks and kills in the middle of a write": ["tests/test_files.py", "tests/test_writers.py"],
    "Damaged and made-up memories and adapters": [
        "tests/memory/test_memory_verify.py",
        "tests/memory/test_hostile_memories.py",
        "tests/adapter/test_hostile_adapters.py",
    ],
}
"""Test files of each attack on files."""


def attack(code: Path, chosen: list[str]) -> dict[str, Any]:
    """Attack a checkout; return for each attack what held, what fell, and figures."""
    results: dict[str, Any] = {}
    for name, run in (server.ATTACKS | workers.ATTACKS).items():
        if not chosen or name in chosen:
            with _timed(name):
                results[name] = run(code)
    if not chosen or set(chosen) & set(client.ATTACKS):
        with _timed("the client"), tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "out.json"
            command = [sys.executable, "-m", "reproduction.attack.client", str(code), str(out)]
            subprocess.run(command, cwd=ROOT, env=_environment(code), check=True, timeout=600)
            results |= json.loads(out.read_text(encoding="utf-8"))
    for name, files in FILES.items():
        if not chosen or name in chosen:
            with _timed(name):
                results[name] = tested(code, [file for file in files if (code / file).is_file()])
    return results


def tested(code: Path, files: list[str]) -> dict[str, Any]:
    """Run a checkout's tests of its files."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-m", "", f"--junit-xml={out}", *files]
        subprocess.run(command, cwd=code, env=_environment(code), capture_output=True, timeout=600)
        suite = next(ElementTree.parse(out).iter("testsuite"))
    count, failed = int(suite.get("tests", 0)), int(suite.get("failures", 0)) + int(suite.get("errors", 0))
    skipped = int(suite.get("skipped", 0))
    return {"held": count - failed - skipped, "fell": failed, "figures": f"{count - skipped} tests, {failed} failed"}


def main() -> None:
    """Attack, print the results, and write them on request."""
    parser = argparse.ArgumentParser(prog="python -m reproduction.attack", description=__doc__)
    parser.add_argument("--write", metavar="RUN", help=f"write the figures into {FILE.name} as this run")
    parser.add_argument("--code", type=Path, default=ROOT, help="checkout to attack; by default this one")
    parser.add_argument("--only", nargs="+", default=[], help="names of attacks; figures of the others are kept")
    given = parser.parse_args()
    results = attack(given.code.resolve(), given.only)
    text = head(["tried", "held", "fell", "figures"])
    for name, one in results.items():
        text += row([name, str(one["held"]), str(one["fell"]), one["figures"]])
    Console(soft_wrap=True).print(text, markup=False)
    if given.write is not None:
        command = ["git", "-C", str(given.code), "rev-parse", "HEAD"]
        commit = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
        kept = read_runs(FILE).get(given.write, {"results": {}})["results"] if given.only else {}
        put_run(FILE, given.write, {"commit": commit, "results": kept | results, "signature": signature({}, 0)})
    # Older checkouts are run to show what fell.
    sys.exit(int(given.write in (None, AFTER) and any(one["fell"] for one in results.values())))


@contextlib.contextmanager
def _timed(name: str) -> Iterator[None]:
    began = time.monotonic()
    yield
    STDERR.print(f"{name}: {time.monotonic() - began:.0f} s", markup=False)


def _environment(code: Path) -> dict[str, str]:
    path = os.pathsep.join([str(code / "src"), str(ROOT)])
    more = {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    return os.environ | more


if __name__ == "__main__":
    main()
