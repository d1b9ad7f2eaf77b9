"""Modules of measurements in separate processes."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence

from reproduction.paths import ROOT


def run_module(module: str, arguments: Sequence[str], threads: int) -> None:
    """Run `python -m module arguments` offline, with a number of threads.

    Raises:
        SystemExit: it failed; the message holds what it said.
    """
    # BLAS and OpenMP read their number of threads when they are loaded.
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    environment |= {"TOKENIZERS_PARALLELISM": "false"}
    command = [sys.executable, "-m", module, *arguments]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"python -m {module} {arguments[0]} failed with {done.returncode}:\n{done.stderr}")
