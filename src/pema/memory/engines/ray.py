"""A build on a Ray cluster: replicas of the PLM, each in an actor, make the shards, and this process writes them.

An actor gets a group and returns the bytes of its shard, so that only this process needs the memory's folder. One that
has died is replaced, and its group is given to another. What is written is in the folder as in every build: the same
call resumes, with Ray or without.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import Tensor

from pema import __version__, console, errors
from pema.errors import ConfigError, MismatchError, PemaError, ProcessError
from pema.extras import require_library
from pema.memory.encoder import Encoder
from pema.memory.groups import Group
from pema.memory.manifest import Manifest, ShardEntry
from pema.memory.shard import packed, write_packed
from pema.owner.contract import PLM, ContextRepresentations, Contexts, Metered, PLMDescription
from pema.owner.opening import open_plm
from pema.schema import from_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from pema.memory.engines.launched import Team
    from pema.owner.head import Head

MOST_DEATHS = 3
"""Number of actors that may die with one group before the build ends."""

LONGEST = 300
"""Maximum length of what a message repeats of an error of Ray."""

SECONDS = 30.0
"""Time between notes that no replica is ready."""


class Worker:
    """What an actor does: it opens the PLM and makes shards.

    Its methods return what they computed, or the kind and the text of an error: not every exception can be sent.
    """

    def __init__(self) -> None:
        self._plm: PLM | None = None
        self._encoder: Encoder | None = None
        self._job: Job | None = None

    def open(self, opener: Callable[[], PLM]) -> dict[str, Any]:
        """Open the PLM; returns its description and the version of pema here."""

        def opened() -> dict[str, Any]:
            self._plm = opener()
            return {"version": __version__, "description": self._plm.description.to_dict()}

        return _told(opened)

    def face(self) -> dict[str, Any]:
        """Return the PLM's tokenizer and head."""
        return _told(lambda: {"tokenizer": self._opened.tokenizer, "head": self._opened.head()})

    def forecast(self, contexts: Contexts, lengths: Sequence[int]) -> dict[str, Any]:
        """Return what the PLM's owner says of the requests of a build."""
        plm = self._opened
        return _told(lambda: {"notes": plm.forecast(contexts, lengths) if isinstance(plm, Metered) else []})

    def encode(self, job: Job, group: Group, scales: Tensor | None) -> dict[str, Any]:
        """Return a group's shard: its entry, and its bytes."""

        def encoded() -> dict[str, Any]:
            if self._encoder is None or self._job != job:
                self._encoder = Encoder(self._opened, Manifest.from_dict(job.manifest), job.batch_tokens)
                self._job = job
            answers: list[ContextRepresentations | None] = [None] * len(group)
            for answer in self._encoder.answers(group):
                answers[answer.index] = answer
            entry, data = packed(group.index, self._encoder.contents(group, answers, scales))
            return {"entry": entry.to_dict(), "data": data}

        return _told(encoded)

    @property
    def _opened(self) -> PLM:
        assert self._plm is not None, "the PLM is not open"
        return self._plm


@dataclass(frozen=True)
class Job:
    """What all groups of a build have in common: its manifest without shards (JSON), and the tokens of a batch."""

    manifest: dict[str, Any]
    batch_tokens: int


class Replicas:
    """Replicas of one PLM on a Ray cluster, which build memories; `build_memory` accepts them as the PLM.

    Attributes:
        description: description of the PLM.
        tokenizer: its tokenizer.
    """

    description: PLMDescription
    tokenizer: PreTrainedTokenizerBase

    def __init__(self, opener: Callable[[], PLM], workers: int, options: dict[str, Any]) -> None:
        """Start the actors, and wait until the first one has opened the PLM.

        Args:
            opener: opens the PLM; it is called in each actor.
            workers: number of replicas.
            options: of each actor, for Ray.

        Raises:
            PemaError: the PLM cannot be opened.
            ProcessError: the actors have died.
        """
        import ray

        self._ray, self._opener, self._options = ray, opener, options
        lost = ray.exceptions
        self._deaths = (
            *(lost.RayActorError, lost.NodeDiedError, lost.WorkerCrashedError, lost.OutOfMemoryError),
            lost.ObjectLostError,
        )
        self._starting: dict[Any, Any] = {}
        self._idle: deque[Any] = deque()
        self._running: dict[Any, tuple[Any, Group]] = {}
        self._actors: list[Any] = []
        self._failures, self._workers = 0, workers
        for _ in range(workers):
            self._start()
        while not self._idle:
            self._step()
        face = self._ask(self._idle[0], "face")
        self.tokenizer, self._head = face["tokenizer"], face["head"]

    def head(self) -> Head:
        """Return the head bundle."""
        head: Head = self._head
        return head

    def forecast(self, contexts: Contexts, lengths: Sequence[int]) -> list[str]:
        """Check the requests of a build; see `pema.owner.contract.Metered`."""
        notes: list[str] = self._ask(self._idle[0], "forecast", contexts, lengths)["notes"]
        return notes

    def write(self, groups: Iterable[Group], batch_tokens: int, team: Team) -> None:
        """Write the shards of the groups.

        Raises:
            PemaError: see `build_memory`.
            ProcessError: a group ended several actors, or there are none left.
        """
        register = team.register
        job = self._ray.put(Job(replace(register.manifest, shards=(), complete=False).to_dict(), batch_tokens))
        waiting = deque(groups)  # of views: the tokens are not copied
        deaths: Counter[int] = Counter()
        while waiting or self._running:
            while waiting and self._idle:
                # The first shard of int8 determines the scales of all.
                scales = register.channel_scales
                if register.manifest.dtype == "int8" and scales is None and waiting[0].index > 0:
                    break
                actor, group = self._idle.popleft(), waiting.popleft()
                self._running[actor.encode.remote(job, group, scales)] = actor, group
            for reference, actor, group in self._step():
                try:
                    told = _value(self._ray.get(reference))
                except self._deaths as error:
                    deaths[group.index] += 1
                    self._replace(error)
                    if deaths[group.index] >= MOST_DEATHS:
                        raise ProcessError(
                            f"{deaths[group.index]} workers ended at the examples {group.names[0]} to "
                            f"{group.names[-1]}: {_line(error)} If memory was short, give fewer tokens in a batch."
                        ) from error
                    waiting.appendleft(group)
                    continue
                if waiting and (register.manifest.dtype != "int8" or register.manifest.shards):
                    following = waiting.popleft()  # before this shard is written, which takes time
                    self._running[actor.encode.remote(job, following, register.channel_scales)] = actor, following
                else:
                    self._idle.append(actor)
                entry = from_json(ShardEntry, told["entry"])
                write_packed(register.folder, entry, told["data"])
                team.enter(group, entry)
                team.advance(float(group.costs.sum()), f"example {group.examples.stop:,}")

    def close(self) -> None:
        """End the actors."""
        for actor in self._actors:
            with contextlib.suppress(Exception):
                self._ray.kill(actor)

    def _start(self) -> None:
        actor = self._ray.remote(**self._options)(Worker).remote()
        self._actors.append(actor)
        self._starting[actor.open.remote(self._opener)] = actor

    def _step(self) -> list[tuple[Any, Any, Group]]:
        """Wait for something to happen; returns the requests that have ended, with their actors and groups."""
        references = [*self._running, *self._starting]
        if not references:
            raise ProcessError("no worker of the Ray cluster is left.")
        since = time.monotonic()
        while not (ready := self._ray.wait(references, num_returns=1, timeout=1.0)[0]):
            if not self._running and time.monotonic() - since > SECONDS:
                since = time.monotonic()
                free = self._ray.available_resources()
                console.note(
                    f"waiting for a worker of the Ray cluster to open the PLM; each takes {self._options['num_cpus']} "
                    f"CPUs and {self._options['num_gpus']} GPUs, of which {free.get('CPU', 0):g} and "
                    f"{free.get('GPU', 0):g} are free."
                )
        ended = []
        for reference in ready:
            if reference in self._running:
                ended.append((reference, *self._running.pop(reference)))
                continue
            actor = self._starting.pop(reference)
            try:
                told = _value(self._ray.get(reference))
            except self._deaths as error:
                self._replace(error)
                continue
            self._admit(told)
            self._idle.append(actor)
        return ended

    def _admit(self, told: dict[str, Any]) -> None:
        """Refuse a replica of another PLM or pema."""
        if told["version"] != __version__:
            raise MismatchError(
                f"a worker has pema {told['version']}, here it is {__version__}: install the same on all machines."
            )
        description = PLMDescription.from_dict(told["description"])
        if hasattr(self, "description"):
            self.description.require_same(description, "the PLM of another worker")
        else:
            self.description = description

    def _replace(self, error: Exception) -> None:
        """Start an actor in place of one that has died."""
        self._failures += 1
        if self._failures > MOST_DEATHS * self._workers:
            raise ProcessError(f"{self._failures} workers of the Ray cluster have ended, the last one: {_line(error)}")
        console.note(f"A worker has ended, its examples are given to another: {_line(error)}")
        self._start()

    def _ask(self, actor: Any, method: str, *arguments: Any) -> dict[str, Any]:  # noqa: ANN401
        try:
            return _value(self._ray.get(getattr(actor, method).remote(*arguments)))
        except self._deaths as error:
            raise ProcessError(f"a worker of the Ray cluster has ended: {_line(error)}") from error


@contextlib.contextmanager
def replicas(
    plm: str | Callable[[], PLM],
    *,
    workers: int | None = None,
    address: str | None = None,
    **loading: Any,  # noqa: ANN401
) -> Iterator[Replicas]:
    """Start replicas of a PLM on a Ray cluster, which end with the block.

    Args:
        plm: its name or address, as `open_plm` takes it, in the workers; or a function that opens it there.
        workers: number of replicas; by default one for each GPU if `device_map` is set, else one for each machine.
        address: address of the cluster; None is that in RAY_ADDRESS, or else Ray is started on this machine. A program
            that has called `ray.init` stays connected to its cluster.
        loading: fields of `LoadConfig`.

    Raises:
        ConfigError: Ray is not installed.
        ProcessError: the cluster cannot be reached, or its workers have died.
        PemaError: the PLM cannot be opened.
    """
    require_library("engine='ray'", "ray", "ray")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # Ray reports to its maker otherwise
    import ray

    own = not ray.is_initialized()
    if own:
        try:
            ray.init(address=address, log_to_driver=False, logging_level="ERROR", include_dashboard=None)
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise ProcessError(
                f"the Ray cluster at {address or os.environ.get('RAY_ADDRESS', 'this machine')} cannot be used: "
                f"{_line(error)}"
            ) from error
    try:
        on_gpu = loading.get("device_map") not in (None, "cpu")
        count, options = _resources([node["Resources"] for node in ray.nodes() if node["Alive"]], workers, on_gpu)
        pool = Replicas(partial(open_plm, plm, **loading) if isinstance(plm, str) else plm, count, options)
        try:
            yield pool
        finally:
            pool.close()
    finally:
        if own:
            ray.shutdown()


def _resources(nodes: list[dict[str, float]], workers: int | None, on_gpu: bool) -> tuple[int, dict[str, Any]]:
    """Return the number of replicas, and what each takes of a cluster's machines."""
    gpus = sum(int(node.get("GPU", 0)) for node in nodes)
    if on_gpu and not gpus:
        raise ConfigError("device_map is set, but the machines of the Ray cluster have no GPU: omit it.")
    count = workers or (gpus if on_gpu else len(nodes))
    cpus = [int(node.get("CPU", 0)) for node in nodes]
    each = max(1, min(sum(cpus) // count, min((n for n in cpus if n), default=1)))
    return count, {"num_cpus": each, "num_gpus": 1 if on_gpu else 0, "scheduling_strategy": "SPREAD"}


def _told(compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Return what a function returns, or the error that it raises."""
    try:
        return compute()
    except PemaError as error:
        kinds = [kind.__name__ for kind in type(error).__mro__ if kind.__module__ == errors.__name__]
        return {"error": kinds[0], "text": str(error)}


def _value(told: dict[str, Any]) -> dict[str, Any]:
    """Raise the error that an actor returned, if it did."""
    if "error" in told:
        kind: type[PemaError] = getattr(errors, told["error"])
        raise kind(told["text"])
    return told


def _line(error: Exception) -> str:
    """Return the last line of what an error of Ray says: the cause comes after the names of the parts."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1][:LONGEST] if lines else type(error).__name__
