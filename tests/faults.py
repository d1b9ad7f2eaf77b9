"""Faults at a chosen disk operation: an error reported by the system, or the end of the process."""

import errno
import os
import shutil
from contextlib import contextmanager
from pathlib import Path

import safetensors.torch
from safetensors import SafetensorError

STEPS = (
    (os, "fsync"),
    (os, "link"),
    (Path, "mkdir"),
    (Path, "chmod"),
    (Path, "rename"),
    (Path, "replace"),
    (Path, "rmdir"),
    (Path, "unlink"),
    (Path, "write_bytes"),
    (Path, "write_text"),
    (shutil, "copyfile"),
    (shutil, "rmtree"),
    (safetensors.torch, "save_file"),
)


def no_space(name):
    """What a full disk makes of a step."""
    if name == "save_file":
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def die(_name):
    """The process ends where it stands; nothing is cleaned up."""
    os._exit(9)


def half(name, arguments):
    """What a write that fails has written by then."""
    if name in ("write_bytes", "write_text"):
        with open(arguments[0], "wb") as file:  # noqa: PTH123
            file.write(b"half")


@contextmanager
def failing(at, fault, behind=False):
    """Let step number `at` of the block fail, before it is done or behind it; yields a list of the steps' names."""
    taken = []

    def changed(name, step):
        def call(*arguments, **values):
            taken.append(name)
            mine = len(taken) - 1 == at
            if mine and not behind:
                half(name, arguments)
                fault(name)
            result = step(*arguments, **values)
            if mine:
                fault(name)
            return result

        return call

    before = [(owner, name, getattr(owner, name)) for owner, name in STEPS]
    for owner, name, step in before:
        setattr(owner, name, changed(name, step))
    try:
        yield taken
    finally:
        for owner, name, step in before:
            setattr(owner, name, step)


def killed(at, work, behind=False):
    """Run `work` in a child that dies at step `at`; whether it came so far."""
    child = os.fork()
    if child == 0:
        try:
            with failing(at, die, behind):
                work()
        except BaseException as error:
            os.write(2, f"{error!r}\n".encode())
            os._exit(1)
        os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, 9), f"the child ended with {status}"
    return status == 9


def leftovers(folder):
    """Names below a folder that no finished writer leaves."""
    return [path.name for path in folder.rglob("*") if path.name.endswith((".partial", ".old")) or ".tmp" in path.name]
