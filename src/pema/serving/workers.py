"""The workers of one server: processes that each have the PLM, started, watched and started again by the router's.

Each listens on a Unix socket in a folder that only this user may enter. The first one is started alone, so that what is
wrong with the PLM is said once, and by it.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import secrets
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2

from pema.errors import ConfigError, PemaError, ProcessError
from pema.lifeline import PYTHON, environment
from pema.serving.connections import Connections
from pema.serving.policy import Policy, reread
from pema.serving.refusal import Refusal, draining, loading
from pema.serving.state import State
from pema.serving.store import Store

logger = logging.getLogger(__name__)

WATCH_SECONDS = 0.2
"""Seconds between two looks at the workers."""

HEALTH_SECONDS = 5.0
"""Seconds that a worker has to say how it is. One that is slow is not ended: it may be short of processor time."""

FIRST_PAUSE, LONGEST_PAUSE = 1.0, 30.0
"""Seconds before a worker that has ended is started again: the first time, and the most after failed starts."""

END_SECONDS = 15.0
"""Maximum seconds for which a worker ends after SIGTERM; then it is killed."""

IDLE_SECONDS = 2.0
"""Seconds for which an unused connection to a worker is kept: fewer than the worker keeps it."""

LONGEST_SOCKET = 100
"""Maximum bytes of the path of a Unix socket, which systems limit to between 104 and 108."""

DEVICES = "CUDA_VISIBLE_DEVICES"


@dataclass(frozen=True)
class Plan:
    """What each worker runs.

    Attributes:
        plm: name of the PLM.
        loaded: settings for loading it.
        policy: the policy file, if there is one.
        store: file of the store that the workers share.
        folder: folder of their sockets.
        environments: the variables that each worker has beside those of this process.
    """

    plm: str
    loaded: Mapping[str, Any]
    policy: Path | None
    store: Path
    folder: Path
    environments: Sequence[Mapping[str, str]]

    def start(self, index: int, rules: Policy, number: int | None) -> Worker:
        """Start a worker.

        Args:
            index: its number.
            rules: the policy in force; the file may have been changed since it was read.
            number: the request to reread that it follows, of those in the store; None if that is unknown.

        Raises:
            ConfigError: the path of its socket is too long.
        """
        name = secrets.token_hex(4)
        path = self.folder / f"{name}.sock"
        if len(os.fsencode(path)) > LONGEST_SOCKET:
            raise ConfigError(f"the path {path} is too long for a socket: set TMPDIR to a folder with a shorter one.")
        given = {
            "plm": self.plm,
            "loaded": dict(self.loaded),
            "policy": None if self.policy is None else str(self.policy),
            "store": str(self.store),
            "rules": str(path.with_suffix(".json")),
            "number": number,
            "socket": str(path),
            "name": name,
            "index": index,
        }
        path.with_suffix(".json").write_text(rules.model_dump_json(), encoding="utf-8")
        process = subprocess.Popen(
            [*PYTHON, "-m", "pema.serving.worker", json.dumps(given)],
            stdin=subprocess.PIPE,  # its end is the end of the worker; see `pema.lifeline`
            stdout=subprocess.DEVNULL,
            env=environment() | dict(self.environments[index]),
            process_group=0,  # Ctrl-C in a terminal reaches the router only, which ends the workers after their work
        )
        limits = httpx2.Limits(max_connections=None, max_keepalive_connections=64, keepalive_expiry=IDLE_SECONDS)
        transport = httpx2.AsyncHTTPTransport(uds=str(path), limits=limits, trust_env=False)
        return Worker(index, name, process, transport)


@dataclass(eq=False)
class Worker:
    """A worker that runs.

    Attributes:
        index: its number, which a worker that replaces it has too.
        name: its name, which no other worker has had.
        process: the process.
        transport: sends requests to it.
        ready: whether it answers requests.
        unanswered: number of requests that it has not answered.
        chosen: number of the last request that was passed to it.
    """

    index: int
    name: str
    process: subprocess.Popen[bytes]
    transport: httpx2.AsyncHTTPTransport
    ready: bool = False
    unanswered: int = 0
    chosen: int = 0

    @contextlib.contextmanager
    def answering(self) -> Iterator[Worker]:
        """Count a request as unanswered inside the block."""
        self.unanswered += 1
        try:
            yield self
        finally:
            self.unanswered -= 1

    async def get(self, path: str, headers: Sequence[tuple[bytes, bytes]] = ()) -> httpx2.Response:
        """Request a path of the worker, with the key among these headers.

        Raises:
            Refusal: 503, it has ended.
        """
        kept = [(name, value) for name, value in headers if name == b"authorization"]
        request = httpx2.Request("GET", f"http://worker{path}", headers=kept)
        try:
            async with asyncio.timeout(HEALTH_SECONDS):
                response = await self.transport.handle_async_request(request)
                await response.aread()
                await response.aclose()
        except (httpx2.TransportError, TimeoutError) as error:
            raise lost() from error
        return response


@dataclass(eq=False)
class _Place:
    """The place of one worker: who is in it, and how long it stays empty."""

    worker: Worker | None = None
    pause: float = 0.0
    empty_until: float = 0.0
    checked: float = field(default_factory=time.monotonic)


class Fleet(State):
    """All workers of a server.

    Args:
        plan: what they run.
        store: the store that they share.
        policy: the policy in force.
        connections: those of this process, whose limit follows the policy.
    """

    def __init__(self, plan: Plan, store: Store, policy: Policy, connections: Connections) -> None:
        super().__init__()
        self._plan, self._store, self._policy, self._connections = plan, store, policy, connections
        self._places = [_Place() for _ in plan.environments]
        self._begun = False  # whether a worker has ever been ready
        self._reread = False
        self._number: int | None = None  # of requests to reread the policy, as of the last one that was followed
        self._requests = 0

    @property
    def ready(self) -> list[Worker]:
        """The workers that answer requests."""
        return [place.worker for place in self._places if place.worker is not None and place.worker.ready]

    @property
    def healthy(self) -> bool:
        """Whether a worker is ready, or may become so."""
        return self.failure is None and (bool(self.ready) or all(place.pause < LONGEST_PAUSE for place in self._places))

    def choose(self, session: str = "") -> Worker:
        """Return the worker for a request: the one that has this session, or the one with the least to do.

        A session of a worker that has ended is unknown to every other one, and any of them may say so.

        Raises:
            Refusal: 503, no worker is ready, or the server is about to stop.
        """
        if self.draining:
            raise draining()
        ready = self.ready
        if not ready:
            raise loading()
        name = session.partition("-")[0]
        worker = next(
            (worker for worker in ready if worker.name == name),
            min(ready, key=lambda worker: (worker.unanswered, worker.chosen)),
        )
        self._requests += 1
        worker.chosen = self._requests
        return worker

    def request_reread(self) -> None:
        """Ask the workers to reread the policy soon; safe in a signal handler."""
        self._reread = True

    async def run(self) -> None:
        """Start the workers, watch them and start them again, until cancelled or one cannot be started at all."""
        try:
            while self.failure is None:
                self._start()
                await asyncio.sleep(WATCH_SECONDS)
                await asyncio.gather(*(self._look(place, place.worker) for place in self._places if place.worker))
                with contextlib.suppress(Refusal):  # the store is unavailable, which is logged; the next time
                    if self._reread:
                        self._store.request_reread()
                        self._reread = False
                    self._follow()
        except PemaError as error:
            self.failure = error

    async def close(self) -> None:
        """End all workers, each after its work."""
        workers = [place.worker for place in self._places if place.worker is not None]
        for worker in workers:
            worker.process.terminate()
        await asyncio.gather(*(asyncio.to_thread(_ended, worker.process) for worker in workers))
        for worker in workers:
            await worker.transport.aclose()
        self._store.close()

    def _follow(self) -> None:
        """Follow a policy that was reread: connections are limited here, and everything else by the workers."""
        number = self._store.rereads()
        if number == self._number:
            return
        self._number = number
        if self._plan.policy is None:
            return
        with contextlib.suppress(ConfigError):  # the workers keep the old one too, and log why
            self._policy = reread(self._plan.policy, self._policy)
            self._connections.resize(self._policy.limits.connections)

    def _start(self) -> None:
        if self.draining:
            return
        for index, place in enumerate(self._places if self._begun else self._places[:1]):
            if place.worker is None and time.monotonic() >= place.empty_until:
                try:
                    place.worker = self._plan.start(index, self._policy, self._number)
                except OSError as error:  # the system has no process or no file left
                    self._wait(place, worked=False, fields={"worker": index, "why": str(error)})

    async def _look(self, place: _Place, worker: Worker) -> None:
        code = worker.process.poll()
        if code is not None:
            await self._replace(place, worker, code)
            return
        now = time.monotonic()
        if worker.ready and now - place.checked < HEALTH_SECONDS:
            return
        place.checked = now
        with contextlib.suppress(Refusal):
            answer = await worker.get("/healthz" if worker.ready else "/readyz")
            if worker.ready and answer.status_code != 200:
                worker.process.kill()  # the thread of its PLM has ended
            elif answer.status_code == 200:
                worker.ready, place.pause, self._begun = True, 0.0, True

    async def _replace(self, place: _Place, worker: Worker, code: int) -> None:
        if self.draining:
            return
        place.worker = None
        _ended(worker.process)
        await worker.transport.aclose()
        if not self._begun:
            self.failure = ProcessError(f"a worker ended with exit code {code} before it was ready, see above.")
            return
        fields = {"worker": worker.index, "code": code, "unanswered": worker.unanswered}
        self._wait(place, worked=worker.ready, fields=fields)

    def _wait(self, place: _Place, *, worked: bool, fields: Mapping[str, object]) -> None:
        """Leave a place empty for some time, longer after each start that did not work."""
        place.pause = FIRST_PAUSE if worked else min(LONGEST_PAUSE, max(FIRST_PAUSE, 2 * place.pause))
        place.empty_until = time.monotonic() + place.pause
        fields = {**fields, "seconds": place.pause}
        logger.error("a worker has ended and is started again", extra={"fields": fields})


def lost() -> Refusal:
    """Return the refusal of a request whose worker has ended."""
    return Refusal(503, "worker_lost", "The worker that had this request has ended.", "Send it again.", retry_after=1)


def environments(workers: int, cores: int, devices: Sequence[str], given: Mapping[str, str]) -> list[dict[str, str]]:
    """Divide the devices and the processor's cores among workers.

    Args:
        workers: number of workers.
        cores: number of cores.
        devices: names of the GPUs; empty if the PLM runs on the processor.
        given: variables of this process; a number of threads among them is kept.

    Returns:
        The variables of each worker.

    Raises:
        ConfigError: the GPUs cannot be divided evenly.
    """
    count = len(devices)
    if not count:
        threads = {} if "OMP_NUM_THREADS" in given else {"OMP_NUM_THREADS": str(max(1, cores // workers))}
        return [dict(threads) for _ in range(workers)]
    if count % workers and workers % count:
        raise ConfigError(
            f"{workers} workers cannot share {count} GPUs evenly: give --workers a divisor or a multiple of {count}, "
            f"or choose GPUs by {DEVICES}."
        )
    each = max(1, count // workers)
    begins = [worker * each % count for worker in range(workers)]
    return [{DEVICES: ",".join(devices[begin : begin + each])} for begin in begins]


def visible_cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def visible_devices() -> list[str]:
    """Return the names of the GPUs that this process may use; asked of another one, which imports torch."""
    command = [*PYTHON, "-c", "import torch; print(torch.cuda.device_count())"]
    asked = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=600)
    count = int(asked.stdout) if asked.returncode == 0 else 0
    names = [name.strip() for name in os.environ.get(DEVICES, "").split(",") if name.strip()]
    return names[:count] if names else [str(index) for index in range(count)]


def _ended(process: subprocess.Popen[bytes]) -> None:
    """Wait until a process has ended, kill it if that takes too long, and close its pipe."""
    try:
        process.wait(END_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    if process.stdin is not None:
        process.stdin.close()
