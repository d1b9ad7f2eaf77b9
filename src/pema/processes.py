"""Several processes of one command, which a launcher has started: `accelerate launch`, `torchrun`, MPI.

Accelerate connects them and gives each its device. All processes run the same code on different parts of the data, and
add up what they computed. One of them, the writer, writes files and speaks to the user. A command that was started by
itself is one process: nothing is imported, and every function below returns what it was given.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from pema.console import silence
from pema.errors import ConfigError, ProcessError
from pema.extras import require_library

if TYPE_CHECKING:
    import torch
    from torch import Tensor

SIZES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
"""Variables of the environment in which launchers say how many processes they started."""

TIMEOUT = timedelta(minutes=10)
"""Maximum time that a process waits for the others. One that has ended is noticed earlier."""

FAILED = "pema/failed"


@dataclass(frozen=True)
class Processes:
    """The processes of this command, seen from one of them.

    Attributes:
        rank: number of this process, from 0.
        count: number of processes.
        device: the device that Accelerate gives this process; None for a single process.
    """

    rank: int = 0
    count: int = 1
    device: torch.device | None = None

    @property
    def is_writer(self) -> bool:
        """Whether this process writes files."""
        return self.rank == 0

    @property
    def runs_on_accelerator(self) -> bool:
        """Whether this process has an accelerator of its own, beside those of the others."""
        return self.device is not None and self.device.type != "cpu"

    def part(self, n: int) -> slice:
        """Return this process's part of n items: contiguous, and of the same size as the others' up to one item."""
        return slice(n * self.rank // self.count, n * (self.rank + 1) // self.count)

    def add(self, tensor: Tensor) -> Tensor:
        """Add the tensors of all processes (same shape and dtype), in place; all get the same bits.

        Raises:
            ProcessError: another process has ended.
        """
        if self.count > 1:
            from torch import distributed

            with connected():
                moved = tensor.to(self.device)
                distributed.all_reduce(moved)
                if moved is not tensor:
                    tensor.copy_(moved)
        return tensor

    def gather(self, tensor: Tensor) -> Tensor:
        """Return the tensors of all processes, (n_k, ...), in one: (sum n_k, ...), in the order of the processes.

        Raises:
            ProcessError: another process has ended.
        """
        if self.count == 1:
            return tensor
        import torch

        lengths = torch.zeros(self.count, dtype=torch.int64)
        lengths[self.rank] = len(tensor)
        first = int(self.add(lengths)[: self.rank].sum())
        whole = tensor.new_zeros(int(lengths.sum()), *tensor.shape[1:])
        whole[first : first + len(tensor)] = tensor
        return self.add(whole)

    def same(
        self, values: Mapping[str, Any] | None = None, tensors: Mapping[str, Tensor] | None = None
    ) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Return the writer's values (JSON) and tensors in all processes, which wait for it.

        Raises:
            ProcessError: another process has ended.
        """
        shared, tensors = dict(values or {}), dict(tensors or {})
        if self.count == 1:
            return shared, tensors
        import torch
        from torch import distributed

        layout = {name: (str(each.dtype).removeprefix("torch."), list(each.shape)) for name, each in tensors.items()}
        text = json.dumps([shared, layout]).encode()
        with connected():
            length = torch.tensor([len(text)], device=self.device)
            distributed.broadcast(length, 0)
            written = torch.frombuffer(bytearray(text if self.is_writer else int(length)), dtype=torch.uint8)
            moved = written.to(self.device)
            distributed.broadcast(moved, 0)
            if not self.is_writer:
                shared, layout = json.loads(bytes(moved.tolist()))
                tensors = {
                    name: torch.empty(shape, dtype=getattr(torch, dtype)) for name, (dtype, shape) in layout.items()
                }
            for name, each in tensors.items():
                moved = each.detach().to(self.device).contiguous()
                distributed.broadcast(moved, 0)
                if not self.is_writer:
                    tensors[name] = moved.cpu()
        return shared, tensors


ALONE = Processes()


def launched() -> bool:
    """Return whether a launcher has started several processes of this command."""
    return any(os.environ.get(name, "").isdecimal() and int(os.environ[name]) > 1 for name in SIZES)


def require_single(what: str) -> None:
    """Refuse what runs in one process if a launcher has started several.

    Raises:
        ConfigError: it has.
    """
    if launched():
        raise ConfigError(f"{what} runs in one process: start it without a launcher.")


@functools.cache
def join() -> Processes:
    """Connect this process with the others of its command; every process that a launcher started must call it.

    The processes that do not write are silent from here on.

    Raises:
        ConfigError: Accelerate is not installed.
        ProcessError: the others cannot be reached.
    """
    if not launched():
        return ALONE
    require_library("a command of several processes", "accelerate", "parallel")
    import torch
    from accelerate import PartialState
    from accelerate.utils import parse_flag_from_env

    cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
    try:
        # A program that has set up Accelerate itself, with another time limit, keeps its settings.
        state = PartialState(cpu=cpu, timeout=TIMEOUT)
    except (RuntimeError, ValueError) as error:
        raise ProcessError(f"the processes of this command cannot be connected: {error}") from error
    processes = Processes(state.process_index, state.num_processes, state.device)
    if not processes.is_writer:
        silence()
    return processes


@functools.cache
def is_first_to_fail() -> bool:
    """Return whether this process, which fails, is the first one: it tells the user why, and no other does.

    An error in one process ends the others too: their connections close, or the launcher stops them. An error in all
    of them, such as a wrong setting, has to be told once.
    """
    if join.cache_info().currsize == 0 or join().count == 1:
        return True
    from torch import distributed

    try:
        store = distributed.distributed_c10d._get_default_store()
        return int(store.add(FAILED, 1)) == 1
    except Exception:  # the process that kept the store has ended: if it was killed, nobody has told
        return join().rank == 1


@contextlib.contextmanager
def connected() -> Iterator[None]:
    """Turn what torch raises in the block, where processes wait for one another, into an error of ours.

    Raises:
        ProcessError: another process has ended.
    """
    try:
        yield
    except RuntimeError as error:
        raise ProcessError(
            "another process of this command has ended or does not answer: its message says why. If there is none, "
            "the system has killed it, or its machine is down."
        ) from error
