"""Start of llama.cpp's server in a child process, which ends with this process in every case."""

from __future__ import annotations

import contextlib
import json
import secrets
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import IO

import torch

from pema.errors import OwnerError
from pema.extras import installs
from pema.lifeline import PYTHON, child
from pema.owner.llamacpp.child import READY

TOKENS = 1 << 14
"""Maximum tokens of all contexts whose state a server that is started here keeps, and of one context."""

SLOTS = 32
"""Maximum number of contexts whose state is kept: the rows of a batch of generation, by default."""

CACHE_MIB = 1024
"""Memory for the states of contexts that have no slot."""

LOGITS_BYTES = 1 << 28
"""Maximum bytes of the logits of a batch, which the server computes for every token of it."""

_LINES = 50


@dataclass(frozen=True)
class Settings:
    """Settings of a server.

    Attributes:
        file: the GGUF file.
        tokens: see `TOKENS`.
        batch: maximum tokens of an example whose representations are requested at once.
        threads: number of threads.
        slots: see `SLOTS`.
        cache_mib: see `CACHE_MIB`.
    """

    file: str
    tokens: int
    batch: int
    threads: int
    slots: int = SLOTS
    cache_mib: int = CACHE_MIB

    @classmethod
    def of(cls, file: Path, context: int, vocabulary_size: int) -> Settings:
        """Return the settings for a model with a context window, with as many threads as torch has."""
        batch = min(context, TOKENS, max(128, LOGITS_BYTES // (4 * vocabulary_size)))
        return cls(str(file.resolve()), TOKENS, batch, torch.get_num_threads())


@dataclass(frozen=True)
class Server:
    """A started server.

    Attributes:
        url: its address.
        key: its API key, known to this process only.
        ended: returns how its process has ended, or None if it runs.
        stop: ends it.
    """

    url: str
    key: str
    ended: Callable[[], str | None]
    stop: Callable[[], None]


def start(settings: Settings) -> Server:
    """Start a server and wait until it has loaded the model.

    Raises:
        OwnerError: xllamacpp is not installed, or cannot load the file.
    """
    require_installed()
    key, last = secrets.token_urlsafe(24), deque[str](maxlen=_LINES)
    with contextlib.ExitStack() as stack:
        command = [*PYTHON, "-m", "pema.owner.llamacpp.child", json.dumps(asdict(settings))]
        process = stack.enter_context(child(command))
        assert process.stdin is not None
        assert process.stderr is not None
        process.stdin.write(f"{key}\n")
        process.stdin.flush()
        url = _address(process.stderr, last)
        if url is None:
            raise OwnerError(f"llama.cpp cannot run {settings.file}: {_reason(last)}.")
        threading.Thread(target=last.extend, args=(process.stderr,), name="llamacpp-log", daemon=True).start()
        stop = stack.pop_all().close

    def ended() -> str | None:
        code = process.poll()
        if code is None:
            return None
        return f"was killed by signal {-code}" if code < 0 else f"ended with {code} ({_reason(last)})"

    return Server(url, key, ended, stop)


def require_installed() -> None:
    """Refuse to go on without xllamacpp, which is not imported here.

    Raises:
        OwnerError: it is not installed.
    """
    if find_spec("xllamacpp") is None:
        raise OwnerError(f"llama.cpp's server is not installed: {installs('llamacpp')}")


def _address(log: IO[str], last: deque[str]) -> str | None:
    """Read the log up to the address; None if it ends without one."""
    for line in log:
        before, ready, address = line.partition(READY)
        if ready:  # the server's log may have begun the line
            return address.strip()
        last.append(before)
    return None


def _reason(last: deque[str]) -> str:
    """Return the first error in the log, without its time and place."""
    lines = [line.strip() for line in last if line.strip()] or ["no output"]
    errors = [line.partition(" E ")[2].partition(": ")[2].strip() for line in lines if " E " in line]
    return next(filter(None, errors), lines[-1]).rstrip(".")
