"""What the processes of one command tell one another while each does its own work.

A thread of each process takes part in rounds, a few in a second. In a round every process says what is new, and hears
what the others say. So each process learns within a round that another has ended or has failed, however long its own
work takes, and none waits for another with a limit of time that depends on the work.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TypeVar

from pema.errors import PemaError, ProcessError
from pema.processes import TIMEOUT, Processes, connected, is_first_to_fail

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

SECONDS = 0.25
"""Time between two rounds."""

WORKING, DONE, FAILED = "working", "done", "failed"

Answer = TypeVar("Answer")


class Exchange:
    """The rounds of one command, as a context in which each process does its work.

    A process that leaves the block by an exception ends the others with a `ProcessError`; one that was killed, too.
    """

    def __init__(self, processes: Processes, report: Callable[[], Any], receive: Callable[[int, Any], None]) -> None:
        """Prepare an exchange.

        Args:
            processes: the processes; every one makes an exchange at the same point.
            report: returns what is new here (JSON), in the thread of the rounds.
            receive: is given what a process reported (its number, JSON), in that thread: in every round of every
                process, this one included, in order.
        """
        self._processes, self._report, self._receive = processes, report, receive
        self._changed = threading.Condition()
        self._state = WORKING
        self._states = [WORKING] * processes.count
        self._error: PemaError | None = None
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Self:
        """Begin with the rounds, once all processes are here.

        Raises:
            ProcessError: another process has ended.
        """
        if self._processes.count > 1:
            from torch import distributed

            with connected():
                # gloo waits for the others without the accelerator, on which each process works.
                group = distributed.new_group(timeout=TIMEOUT, backend="gloo")
            self._thread = threading.Thread(target=self._run, args=(group,), name="pema-exchange", daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._thread is None:
            return
        if kind is not None and not (isinstance(error, ProcessError) and error is self._error):
            is_first_to_fail()  # before the others hear of it, who say less
        with self._changed:
            if kind is not None:
                self._state = FAILED
        self._thread.join()

    def require(self) -> None:
        """Go on only while all processes work.

        Raises:
            ProcessError: another process has ended or failed.
            PemaError: what another said could not be received.
        """
        if self._error is not None:
            raise self._error

    def wait(self, until: Callable[[], Answer | None]) -> Answer:
        """Wait for something that another process tells.

        Args:
            until: returns None as long as it has not been told.

        Raises:
            ProcessError: another process has ended or failed.
        """
        with self._changed:
            while True:
                self.require()
                answer = until()
                if answer is not None:
                    return answer
                assert self._thread is not None, "nothing would change"
                self._changed.wait(SECONDS)

    def finish(self) -> None:
        """Say that this process is done, and wait for the others.

        Raises:
            ProcessError: another process has ended or failed.
        """
        if self._thread is None:
            return
        with self._changed:
            self._state = DONE
        self.wait(lambda: True if set(self._states) == {DONE} else None)

    def _run(self, group: ProcessGroup) -> None:
        try:
            while self._round(group):
                with self._changed:
                    self._changed.wait_for(lambda: self._state == FAILED, SECONDS)
        except PemaError as error:
            self._fail(error)

    def _round(self, group: ProcessGroup) -> bool:
        """Take part in one round; returns whether there is another."""
        state = self._state
        told = [] if state == FAILED else self._report()
        heard = [json.loads(text) for text in _gather(json.dumps([state, told]).encode(), group)]
        states = [each[0] for each in heard]
        if FAILED in states:
            self._fail(
                ProcessError(f"process {states.index(FAILED)} of this command has failed: its message says why.")
            )
            return False
        try:
            for rank, (_, told) in enumerate(heard):
                self._receive(rank, told)
        except PemaError as error:  # the others hear of it in the next round, when this process has left its work
            self._fail(error)
        with self._changed:
            self._states = states
            self._changed.notify_all()
        return set(states) != {DONE}

    def _fail(self, error: PemaError) -> None:
        with self._changed:
            if self._error is None:
                self._error = error
            self._changed.notify_all()


def _gather(data: bytes, group: ProcessGroup) -> list[bytes]:
    """Return the bytes of all processes, in their order."""
    import torch
    from torch import distributed

    with connected():
        lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(distributed.get_world_size(group))]
        distributed.all_gather(lengths, torch.tensor([len(data)]), group=group)
        longest = max(int(length) for length in lengths)
        padded = torch.frombuffer(bytearray(data.ljust(longest)), dtype=torch.uint8)
        parts = [torch.empty_like(padded) for _ in lengths]
        distributed.all_gather(parts, padded, group=group)
    return [part.numpy().tobytes()[: int(length)] for part, length in zip(parts, lengths, strict=True)]
