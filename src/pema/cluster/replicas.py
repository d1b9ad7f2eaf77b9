"""Replicas of one PLM, each in an actor of a Ray cluster, and the distribution of work over them.

An actor that has died is replaced, and its unit of work is given to another one. What a unit contains, and what becomes
of its result, is the business of who distributes it (`memory.engines.ray`, `generation.replicated`).
"""

from __future__ import annotations

import contextlib
import json
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from pema import __version__, console
from pema.cluster.connection import last_line, wanted
from pema.cluster.worker import Answer, Begin, Worker, value
from pema.errors import MismatchError, ProcessError
from pema.owner.contract import PLM, Contexts, Metered, PLMDescription
from pema.owner.head import Head
from pema.owner.wire import pack, unpack

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MOST_DEATHS = 3
"""Number of actors that may die with one unit of work before the work ends."""

SECONDS = 30.0
"""Time between notes that no replica is ready."""

Unit = TypeVar("Unit")


class Replicas:
    """Replicas of one PLM; `build_memory`, `generate`, `classify` and `tune` accept them as the PLM.

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
        self._left: dict[Any, Any] = {}
        self._actors: list[Any] = []
        self._failures, self._workers = 0, workers
        try:
            for _ in range(workers):
                self._start()
            self.tokenizer = self.ask(_tokenizer)["tokenizer"]
        except BaseException:
            self.close()  # a program that keeps its connection would keep the actors, and their devices
            raise

    def wait_for_all(self) -> None:
        """Wait until every replica has opened the PLM; without it, work begins with the first.

        Raises:
            PemaError: see `__init__`.
        """
        while self._starting:
            self._step({})

    def head(self) -> Head:
        """Return the head bundle, on this machine's CPU.

        Raises:
            PemaError: as raised in a replica.
            ProcessError: replicas have ended.
        """
        tensors, texts = unpack(self.ask(_head)["head"])
        return Head.of(tensors, json.loads(texts["settings"]), texts["fingerprint"])

    def forecast(self, contexts: Contexts, lengths: Sequence[int]) -> list[str]:
        """Check the requests of a build; see `pema.owner.contract.Metered`."""
        notes: list[str] = self.ask(_forecast, contexts, lengths)["notes"]
        return notes

    def ask(self, function: Callable[..., Answer], *arguments: Any) -> Answer:  # noqa: ANN401
        """Return what a function of the PLM, and of these arguments, returns in a replica.

        A replica that has ended is replaced, and another one is asked.

        Raises:
            PemaError: as raised there.
            ProcessError: the question ended several replicas, or there are none left.
        """
        deaths = 0
        while True:
            while not self._idle:
                self._step({})
            actor = self._idle[0]
            try:
                return value(self._ray.get(actor.ask.remote(function, *arguments)))
            except self._deaths as error:
                self._idle.remove(actor)
                self._replace(error)
                deaths += 1
                if deaths == MOST_DEATHS:
                    raise ProcessError(
                        f"{deaths} workers of the Ray cluster ended when they were asked: {last_line(error)}"
                    ) from error

    def work(
        self,
        begin: Begin,
        job: Any,  # noqa: ANN401
        units: Iterable[Unit],
        arguments: Callable[[Unit], tuple[Any, ...] | None],
        *,
        name: Callable[[Unit], str],
        remedy: str,
    ) -> Iterator[tuple[Unit, Answer]]:
        """Do units of work, the first ones first, and yield each with its answer as it comes.

        The next unit is sent before an answer is yielded, so that a replica works while the answer is used.

        Args:
            begin: see `pema.cluster.worker.Begin`.
            job: what all units have in common.
            units: the units.
            arguments: what is sent for a unit; None if it, and all after it, must wait for an answer.
            name: what messages call a unit.
            remedy: what may help if memory was short, for the message.

        Raises:
            PemaError: as raised in a replica.
            ProcessError: a unit ended several actors, or there are none left.
        """
        shared = self._ray.put(job)
        waiting: deque[tuple[int, Unit]] = deque(enumerate(units))
        running: dict[Any, tuple[Any, int, Unit]] = {}
        deaths: Counter[int] = Counter()

        def send() -> None:
            while waiting and self._idle and (given := arguments(waiting[0][1])) is not None:
                actor = self._idle.popleft()
                running[actor.work.remote(begin, shared, *given)] = actor, *waiting.popleft()

        try:
            while waiting or running:
                send()
                for reference in self._step(running):
                    actor, number, unit = running.pop(reference)
                    try:
                        answer = self._ray.get(reference)
                    except self._deaths as error:
                        deaths[number] += 1
                        self._replace(error)
                        if deaths[number] >= MOST_DEATHS:
                            raise ProcessError(
                                f"{deaths[number]} workers ended at {name(unit)}: {last_line(error)} If memory was "
                                f"short, {remedy}."
                            ) from error
                        waiting.appendleft((number, unit))
                        continue
                    except self._ray.exceptions.RayTaskError:  # an error that is none of pema's; the actor lives
                        self._idle.append(actor)
                        raise
                    self._idle.append(actor)
                    value(answer)
                    send()
                    yield unit, answer
        finally:
            # After an error the other actors are still at work: what they answer is dropped.
            self._left |= {reference: actor for reference, (actor, _, _) in running.items()}

    def close(self) -> None:
        """End the actors."""
        for actor in self._actors:
            with contextlib.suppress(Exception):
                self._ray.kill(actor)

    def _start(self) -> None:
        actor = self._ray.remote(**self._options)(Worker).remote()
        self._actors.append(actor)
        self._starting[actor.open.remote(self._opener)] = actor

    def _step(self, running: dict[Any, Any]) -> list[Any]:
        """Wait for something to happen; returns the requests among `running` that have ended."""
        references = [*running, *self._left, *self._starting]
        if not references:
            raise ProcessError("no worker of the Ray cluster is left.")
        since = time.monotonic()
        while not (ready := self._ray.wait(references, num_returns=1, timeout=1.0)[0]):
            if not running and time.monotonic() - since > SECONDS:
                since = time.monotonic()
                console.note(f"waiting for a worker of the Ray cluster to open the PLM; {wanted(self._options)}")
        for reference in ready:
            if reference not in running:
                self._receive(reference)
        return [reference for reference in ready if reference in running]

    def _receive(self, reference: Any) -> None:  # noqa: ANN401
        """Make an actor that has started, or ended what nobody waits for, ready for work."""
        is_new = reference in self._starting
        actor = (self._starting if is_new else self._left).pop(reference)
        try:
            answer = self._ray.get(reference)
        except self._deaths as error:
            self._replace(error)
            return
        except self._ray.exceptions.RayTaskError:
            if is_new:
                raise
        else:
            if is_new:
                self._admit(value(answer))
        self._idle.append(actor)

    def _admit(self, opened: Answer) -> None:
        """Refuse a replica of another PLM or pema."""
        if opened["version"] != __version__:
            raise MismatchError(
                f"a worker has pema {opened['version']}, here it is {__version__}: install the same on all machines."
            )
        description = PLMDescription.from_dict(opened["description"])
        if hasattr(self, "description"):
            self.description.require_same(description, "the PLM of another worker")
        else:
            self.description = description

    def _replace(self, error: Exception) -> None:
        """Start an actor in place of one that has died."""
        self._failures += 1
        if self._failures > MOST_DEATHS * self._workers:
            raise ProcessError(
                f"{self._failures} workers of the Ray cluster have ended, the last one: {last_line(error)}"
            )
        console.note(f"A worker has ended, its work is given to another: {last_line(error)}")
        self._start()


def _tokenizer(plm: PLM) -> Answer:
    return {"tokenizer": plm.tokenizer}


def _head(plm: PLM) -> Answer:
    # As bytes: a tensor of a device that this process has and the other one lacks could not be sent.
    head = plm.head()
    return {"head": pack(head.state_dict(), {"settings": json.dumps(head.settings), "fingerprint": head.fingerprint})}


def _forecast(plm: PLM, contexts: Contexts, lengths: Sequence[int]) -> Answer:
    return {"notes": plm.forecast(contexts, lengths) if isinstance(plm, Metered) else []}
