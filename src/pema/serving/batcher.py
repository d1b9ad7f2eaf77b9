"""Batching of the requests of several clients, in the only thread that runs the PLM; fair to all keys.

transformers' continuous batching cannot do this: it returns the tokens that it sampled itself, never the hidden states
that are the representations, and it changes the model's attention to a paged one. What remains to be done is to
concatenate the sequences of waiting requests (`PLM.represent` and `PLM.predict` group them by length and pad them), and
to stack the steps of sessions.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from torch import Tensor

from pema.owner.contract import PLM, ContextRepresentations
from pema.owner.local.session import Step, advance_together
from pema.owner.mask import MaskedPLM
from pema.serving.refusal import Refusal, session_expired

T = TypeVar("T")
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Sequences:
    """The arguments of one request to `PLM.represent` or `PLM.predict`.

    Attributes:
        plm: the PLM in its own coordinates, so that requests with different masks share forward passes.
        kind: the method.
        sequences: its first argument.
        numbers: its second argument.
        mask: the mask that the answers go through, if any.
    """

    plm: PLM
    kind: Literal["represent", "predict"]
    sequences: Sequence[Sequence[int]]
    numbers: Sequence[int]
    mask: MaskedPLM | None = None

    def joins(self, other: object) -> bool:
        """Whether one call can answer both."""
        return isinstance(other, Sequences) and self.plm is other.plm and self.kind == other.kind

    def seen(self, answer: ContextRepresentations) -> ContextRepresentations:
        """Return an answer of the PLM in the coordinates of the request's key."""
        return answer if self.mask is None else self.mask.masked(answer)


Work = Sequences | Step | Callable[[], Any]


@dataclass(eq=False)
class _Job:
    key: str
    tokens: int
    work: Work
    width: int = 1
    future: Future[Any] = field(default_factory=Future)
    arrived: float = field(default_factory=time.monotonic)


class Batcher:
    """The queue of the PLM, and the thread that runs it.

    The next job is always one of the waiting key that has had the fewest tokens; a key that comes back after a pause
    starts at the level of the key served last.

    Args:
        window: seconds for which a request waits for others while the PLM is idle.
        tokens: maximum tokens of the requests in one call.
        queue: maximum number of waiting requests.
        seen: called with the number of requests and tokens of each call.
    """

    def __init__(
        self,
        *,
        window: float,
        tokens: int,
        queue: int,
        seen: Callable[[int, int], None] = lambda requests, tokens: None,
    ) -> None:
        self._window = window
        self._tokens = tokens
        self._queue = queue
        self._seen = seen
        self._jobs: list[_Job] = []
        self._served: dict[str, float] = {}
        self._level = 0.0
        self._closing = False
        self._change = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="pema-plm", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Number of requests in the queue."""
        return len(self._jobs)

    @property
    def alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread.is_alive()

    def contexts(self, work: Sequences, *, key: str, tokens: int) -> Future[list[ContextRepresentations]]:
        """Return the answers to one request, in its order.

        Raises:
            Refusal: 503, too many requests wait.
        """
        return self._submit(_Job(key, tokens, work))

    def step(self, work: Step, *, key: str, tokens: int, width: int) -> Future[tuple[Tensor, int]]:
        """Take a step in a session, and return its representations and the session's memory.

        Steps share a call as long as all of their rows, padded to the longest context, fit into it: their cost is the
        product, and one long context beside many short ones costs as much as if all were long.

        Args:
            work: the step.
            key: name of its key.
            tokens: number of rows after it.
            width: tokens of its longest context after it, padding included.

        Raises:
            Refusal: 503, too many requests wait.
        """
        return self._submit(_Job(key, tokens, work, width))

    def call(self, work: Callable[[], T], *, key: str, tokens: int) -> Future[T]:
        """Call `work` in the PLM's thread, and return its result.

        Raises:
            Refusal: 503, too many requests wait.
        """
        return self._submit(_Job(key, tokens, work))

    def change(self, *, window: float, tokens: int, queue: int) -> None:
        """Set other limits, for the requests from now on."""
        with self._change:
            self._window, self._tokens, self._queue = window, tokens, queue
            self._change.notify()

    def close(self, timeout: float | None = None) -> None:
        """Finish the waiting jobs, then end the thread; return after `timeout` seconds at the latest."""
        with self._change:
            self._closing = True
            self._change.notify()
        self._thread.join(timeout)

    def _submit(self, job: _Job) -> Future[Any]:
        with self._change:
            turned_away = self._make_place(job)
            if all(job.key != other.key for other in self._jobs):
                self._served[job.key] = max(self._served.get(job.key, 0.0), self._level)
            self._jobs.append(job)
            self._change.notify()
        if turned_away is not None and turned_away.future.set_running_or_notify_cancel():
            turned_away.future.set_exception(self._busy())
        job.future.add_done_callback(self._forget)
        return job.future

    def _make_place(self, job: _Job) -> _Job | None:
        """Make a place in a full queue: the key with the most jobs loses its last one, which is returned."""
        if self._closing:
            raise self._busy()
        if len(self._jobs) < self._queue:
            return None
        places = Counter(other.key for other in self._jobs)
        key, most = places.most_common(1)[0]
        if most <= places[job.key] + 1:
            raise self._busy()
        last = max((other for other in self._jobs if other.key == key), key=lambda other: other.arrived)
        self._jobs.remove(last)
        return last

    def _busy(self) -> Refusal:
        message = f"{len(self._jobs)} requests wait for the PLM already."
        return Refusal(503, "busy", message, "Try again after the time in Retry-After.", retry_after=1)

    def _forget(self, future: Future[Any]) -> None:
        """Remove an abandoned job from the queue."""
        # By its future: a callback that refers to the job would keep the answer alive.
        if future.cancelled():
            with self._change:
                self._jobs[:] = [job for job in self._jobs if job.future is not future]

    def _run(self) -> None:
        while jobs := self._next():
            alive = [job for job in jobs if job.future.set_running_or_notify_cancel()]
            if alive:
                self._seen(len(alive), sum(job.tokens for job in alive))
                _answer(alive, self._tokens)

    def _next(self) -> list[_Job]:
        """Wait for the jobs of the next call and return them; none if the batcher is closed."""
        with self._change:
            while True:
                if not self._jobs:
                    if self._closing:
                        return []
                    self._change.wait()
                    continue
                order = sorted(self._jobs, key=lambda job: (self._served[job.key], job.arrived))
                together = _joining(order[0], order)
                left = order[0].arrived + self._window - time.monotonic()
                full = sum(job.tokens for job in together) >= self._tokens
                if isinstance(order[0].work, Sequences) and left > 0 and not full and not self._closing:
                    # Only sequences wait for others. A step is a token that a user waits for: it runs meanwhile.
                    ready = next((job for job in order if not isinstance(job.work, Sequences)), None)
                    if ready is None:
                        self._change.wait(left)
                        continue
                    together = _joining(ready, order)
                return self._take(self._fitting(together))

    def _fitting(self, together: list[_Job]) -> list[_Job]:
        """Choose as many jobs as fit into one call, at least one; after each, the least served key is next."""
        served = dict(self._served)
        chosen: list[_Job] = []
        tokens = width = 0
        while together:
            job = min(together, key=lambda job: (served[job.key], job.arrived))
            tokens, width = tokens + job.tokens, max(width, job.width)
            if chosen and tokens * width > self._tokens:
                break
            together.remove(job)
            chosen.append(job)
            served[job.key] += job.tokens
        return chosen

    def _take(self, jobs: list[_Job]) -> list[_Job]:
        self._level = self._served[jobs[0].key]
        for job in jobs:
            self._jobs.remove(job)
            self._served[job.key] += job.tokens
        return jobs


def _joining(job: _Job, order: list[_Job]) -> list[_Job]:
    """Return the jobs that one call can answer together with this one, itself included."""
    work = job.work
    if isinstance(work, Sequences):
        return [other for other in order if work.joins(other.work)]
    return [other for other in order if other is job or (isinstance(work, Step) and isinstance(other.work, Step))]


def _answer(jobs: list[_Job], tokens: int) -> None:
    """Run jobs in one call and settle their futures."""
    first = jobs[0].work
    answers: Sequence[Any]
    try:
        if isinstance(first, Sequences):
            answers = _together(jobs, tokens)
        elif isinstance(first, Step):
            steps = [job.work for job in jobs if isinstance(job.work, Step)]
            advance_together(steps)
            answers = [(step.session.representations, step.session.held_bytes) for step in steps]
        else:
            answers = [first()]
    except BaseException as error:
        if len(jobs) == 1:
            jobs[0].future.set_exception(error)
            return
        if isinstance(first, Step):
            # A step cannot be taken again here, and which of them failed is unknown.
            logger.warning("the steps of %d sessions failed together (%s)", len(jobs), type(error).__name__)
            for job in jobs:
                job.future.set_exception(session_expired("a step of it failed"))
            return
        # One of them is at fault, or they are too large together: neither may cost the others their answers.
        logger.warning("a call for %d requests failed (%s), each is run alone", len(jobs), type(error).__name__)
        for job in jobs:
            _answer([job], tokens)
        return
    for job, answer in zip(jobs, answers, strict=True):
        job.future.set_result(answer)


def _together(jobs: list[_Job], tokens: int) -> list[list[ContextRepresentations]]:
    works = [job.work for job in jobs if isinstance(job.work, Sequences)]
    first = works[0]
    sequences = [sequence for work in works for sequence in work.sequences]
    numbers = [number for work in works for number in work.numbers]
    run = first.plm.represent if first.kind == "represent" else first.plm.predict
    by_index = {answer.index: answer for answer in run(sequences, numbers, batch_tokens=tokens)}
    answers, begin = [], 0
    for work in works:
        end = begin + len(work.sequences)
        answers.append([work.seen(by_index[i]) for i in range(begin, end)])
        begin = end
    return answers
