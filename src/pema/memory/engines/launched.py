"""The processes that a launcher has started for one build: process p of n writes every n-th shard, from the p-th on.

Process 0, the writer, holds the memory's lock, begins the manifest and enters the shards of all in it. The others write
shards and receipts into the same folder.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from torch import Tensor

from pema.errors import ConfigError, PemaError
from pema.exchange import Exchange
from pema.memory.groups import Group
from pema.memory.manifest import FILE, Manifest, ShardEntry
from pema.memory.register import Register
from pema.processes import Processes
from pema.schema import from_json


class Team:
    """The processes of one build, seen from one of them; a process alone is a team of one.

    Attributes:
        processes: the processes.
    """

    def __init__(self, processes: Processes) -> None:
        self.processes = processes
        self._exchange = Exchange(processes, self._report, self._receive)
        self._lock = threading.Lock()
        self._register: Register | None = None
        self._show: Callable[..., None] = lambda *_, **__: None
        self._news: dict[str, Any] = {}
        self._said: dict[str, Any] = {}
        self._remaining: Sequence[int] = ()
        self._heard: list[tuple[int, ShardEntry]] = []

    def __enter__(self) -> Self:
        self._exchange.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._exchange.__exit__(kind, error, trace)

    def say(self, name: str, value: Any) -> None:  # noqa: ANN401
        """Tell the others a value (JSON); the writer does."""
        with self._lock:
            self._news.setdefault("said", {})[name] = value

    def hear(self, name: str) -> Any:  # noqa: ANN401
        """Wait for a value that the writer says.

        Raises:
            ProcessError: another process has ended or failed.
        """
        (value,) = self._exchange.wait(lambda: [self._said[name]] if name in self._said else None)
        return value

    def begin(self, register: Register, remaining: Sequence[int]) -> None:
        """Tell the others what the memory contains, and which shards are to be written; the writer calls it."""
        with self._lock:
            self._register, self._remaining = register, remaining
        begun = {
            "folder": str(register.folder.resolve()),
            "manifest": register.manifest.to_dict(),
            "waiting": _listed(register.waiting.items()),
            "remaining": list(remaining),
        }
        self.say("begun", begun)

    def join(self) -> Register:
        """Wait until the writer has begun the memory, and return its register.

        Raises:
            ConfigError: this process does not see the memory's folder.
            ProcessError: another process has ended or failed.
        """
        begun = self.hear("begun")
        folder, manifest = Path(begun["folder"]), Manifest.from_dict(begun["manifest"])
        if _constant(folder) != (manifest.plm, manifest.inputs, manifest.head):
            raise ConfigError(
                f"process {self.processes.rank} does not see the {FILE} that process 0 has written in {folder}: "
                "the processes of a build need one folder, on a file system that all their machines share."
            )
        register = Register(folder, manifest, dict(_entries(begun["waiting"])), writes=False)
        with self._lock:
            self._register, self._remaining = register, begun["remaining"]
            for index, entry in self._heard:
                register.accept(index, entry)
        return register

    def share(self, groups: Mapping[int, range]) -> list[tuple[int, range]]:
        """Return this process's share of the groups, by the numbers that the writer told at the beginning.

        What is written by now must not count: the processes begin at different times.
        """
        return [(index, groups[index]) for index in self._remaining[self.processes.rank :: self.processes.count]]

    def advance(self, tokens: float, note: str = "", *, earlier: bool = False) -> None:
        """Report progress of this process.

        Raises:
            ProcessError: another process has ended or failed.
        """
        self._exchange.require()
        with self._lock:
            if self.processes.is_writer:
                self._show(tokens, note, earlier=earlier)
            else:
                name = "earlier" if earlier else "tokens"
                self._news[name] = self._news.get(name, 0.0) + tokens

    def showing(self, show: Callable[..., None]) -> None:
        """Show the progress of all processes with this function from now on."""
        self._show = show

    def enter(self, group: Group, entry: ShardEntry) -> None:
        """Enter a shard that this process has written, and tell the others.

        Raises:
            StorageError: writing failed.
        """
        self.register.enter(group.index, group.examples, entry)
        with self._lock:
            self._news.setdefault("shards", []).extend(_listed([(group.index, entry)]))

    def scales(self) -> Tensor | None:
        """Return the channel scales of the memory's first shard once it is written; None if they are not needed.

        Raises:
            ProcessError: another process has ended or failed.
        """
        register = self.register
        if register.manifest.dtype != "int8":
            return None
        return self._exchange.wait(lambda: register.channel_scales)

    def complete(self) -> None:
        """Wait until the shards of all processes are in the manifest.

        Raises:
            ProcessError: another process has ended or failed.
        """
        self._exchange.wait(lambda: True if self.register.manifest.complete else None)

    def finish(self) -> None:
        """Wait until all processes are done.

        Raises:
            ProcessError: another process has ended or failed.
        """
        self._exchange.finish()

    @property
    def register(self) -> Register:
        """The register of the memory, which is begun."""
        assert self._register is not None, "the memory is not begun"
        return self._register

    def _report(self) -> dict[str, Any]:
        with self._lock:
            news, self._news = self._news, {}
        return news

    def _receive(self, rank: int, news: dict[str, Any]) -> None:
        if rank == self.processes.rank:
            return
        with self._lock:
            self._said |= news.get("said", {})
            for index, entry in _entries(news.get("shards", [])):
                if self._register is None:
                    self._heard.append((index, entry))
                else:
                    self._register.accept(index, entry)
            for name in ("earlier", "tokens"):
                if name in news:
                    self._show(news[name], "", earlier=name == "earlier")


def _constant(folder: Path) -> tuple[Any, ...]:
    """Return what does not change in the manifest of a memory that is being built; nothing if there is none."""
    try:
        stored = Manifest.read(folder)
    except (PemaError, OSError):
        return ()
    return stored.plm, stored.inputs, stored.head


def _listed(entries: Iterable[tuple[int, ShardEntry]]) -> list[list[Any]]:
    return [[index, entry.to_dict()] for index, entry in entries]


def _entries(listed: list[list[Any]]) -> Iterator[tuple[int, ShardEntry]]:
    for index, values in listed:
        yield index, from_json(ShardEntry, values)
