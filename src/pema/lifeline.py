"""Child processes that do not outlive their parent, however it ends: normally, by an exception or by any signal.

The parent holds the write end of a pipe that is the child's standard input. The operating system closes it when the
parent ends, and the child, which waits for that in a thread, ends too. On Linux the kernel also kills the child when
its parent ends, which does not depend on the child's interpreter.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

PR_SET_PDEATHSIG = 1
"""Option of prctl(2): the signal that the process receives when its parent ends."""

PYTHON = (sys.executable, "-P")
"""Command of an interpreter that does not import libraries from the working directory."""

ORPHANED = 1
"""Exit code of a child whose parent has ended."""


@contextlib.contextmanager
def child(command: Sequence[str]) -> Iterator[subprocess.Popen[str]]:
    """Run a command that calls `end_with_parent`; when the block ends, for whatever reason, it has ended too.

    It imports from the same folders as this process. Its standard error can be read; its standard output is discarded.
    """
    process = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
    )
    try:
        yield process
    finally:
        process.kill()  # has no effect if the child has ended
        process.wait()
        for pipe in (process.stdin, process.stderr):
            if pipe is not None:
                pipe.close()


def environment() -> dict[str, str]:
    """Return the environment of a child that imports from the same folders as this process."""
    path = os.pathsep.join(str(Path(each).resolve()) for each in sys.path if each)
    return os.environ | {"PYTHONPATH": path}


def end_with_parent(*, by_kernel: bool = True) -> None:
    """End this process as soon as its parent has ended; call it first in a process that `child` started.

    Args:
        by_kernel: whether the kernel kills it too, which it does when the *thread* that started the process ends.
    """
    if by_kernel and sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    threading.Thread(target=_wait_for_parent, name="lifeline", daemon=True).start()


def _wait_for_parent() -> None:
    with contextlib.suppress(OSError):
        while os.read(0, 1):
            pass
    os._exit(ORPHANED)
