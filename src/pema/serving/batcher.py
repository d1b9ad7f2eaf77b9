"""One thread runs the PLM; requests of several clients go through it together, and every key gets its turn.

transformers' continuous batching cannot do this: it hands out the tokens that it sampled itself, never the hidden
states that a representation is, and it changes the model's attention to a paged one. What is left to do is to put the
sequences of waiting requests behind one another (bucketing by length and padding are `PLM.represent`'s and
`PLM.predict`'s own), and the steps of sessions below one another.
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
    """The queue in front of the PLM, and the thread behind it.

    Fair: the next job is always one of the key that has had the fewest tokens among those that wait, where a key that
    comes back after a pause is level with the one served last.

    Args:
        window: seconds that a request waits for others while the PLM has nothing else to do.
        tokens: tokens of requests that go into one call.
        queue: requests that may wait.
        seen: told of each call that answers requests: how many, and how many tokens.
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
        """Requests in the queue."""
        return len(self._jobs)

    @property
    def alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread.is_alive()

    def contexts(self, work: Sequences, *, key: str, tokens: int) -> Future[list[ContextRepresentations]]:
        """The answers of one request, in its order.

        Raises:
            Refusal: 503, too many requests wait.
        """
        return self._submit(_Job(key, tokens, work))

    def step(self, work: Step, *, key: str, tokens: int, width: int) -> Future[tuple[Tensor, int]]:
        """Take a step in a session, with the steps of others that wait: its representations, and what it then holds.

        Steps go together as long as all of their rows, padded to the longest context, fit into one call: what they need
        is the product, and one long context beside many short ones would cost as much as if all were long.

        Args:
            work: the step.
            key: whose it is.
            tokens: rows after it.
            width: tokens of its longest context after it, padding among them.

        Raises:
            Refusal: 503, too many requests wait.
        """
        return self._submit(_Job(key, tokens, work, width))

    def call(self, work: Callable[[], T], *, key: str, tokens: int) -> Future[T]:
        """Whatever `work` returns, called in the PLM's thread.

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
        """Finish what waits, then end the thread; return after `timeout` seconds where that takes longer."""
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
        """A place in the queue; a key that fills it gives its last place to one that has fewer."""
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
        return Refusal(503, "busy", message, "Try again as Retry-After says.", retry_after=1)

    def _forget(self, future: Future[Any]) -> None:
        """Take a job that nobody waits for out of the queue."""
        # By its future alone: a callback that held the job would keep the answer alive with it.
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
        """The jobs of the next call; none when there is nothing left to do ever."""
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
                    # Only sequences wait for others. A step is a token that somebody watches: it goes meanwhile.
                    ready = next((job for job in order if not isinstance(job.work, Sequences)), None)
                    if ready is None:
                        self._change.wait(left)
                        continue
                    together = _joining(ready, order)
                return self._take(self._fitting(together))

    def _fitting(self, together: list[_Job]) -> list[_Job]:
        """As many jobs as fit into one call, at least one; after each the least served key is next."""
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
    """The jobs that can be answered with this one by the same call, itself among them."""
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
            # A step cannot be taken again here, and whose it was that failed is not known.
            logger.warning("the steps of %d sessions failed together (%s)", len(jobs), type(error).__name__)
            for job in jobs:
                job.future.set_exception(session_expired("a step of it failed"))
            return
        # One of them is at fault, or they are too much together: neither may cost the others their answer.
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
