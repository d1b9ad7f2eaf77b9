"""What runs in an actor of a Ray cluster: a PLM, and functions that use it.

Answers and errors are plain values: not every exception can be sent, and an error of pema keeps its type and its text.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from pema import __version__, errors
from pema.errors import PemaError
from pema.owner.contract import PLM

Answer = dict[str, Any]
"""What a function returned, by name; or the type and the text of the error that it raised."""

Begin = Callable[[PLM, Any], AbstractContextManager[Callable[..., Answer]]]
"""Function of the PLM and a job: it prepares for the job, and yields the function of one unit of its work."""


class Worker:
    """A replica of the PLM. Its methods return an `Answer`."""

    def __init__(self) -> None:
        self._plm: PLM | None = None
        self._prepared: tuple[Begin, Any, Callable[..., Answer]] | None = None
        self._job = contextlib.ExitStack()

    def open(self, opener: Callable[[], PLM]) -> Answer:
        """Open the PLM; returns its description and the version of pema here."""

        def opened() -> Answer:
            self._plm = opener()
            return {"version": __version__, "description": self._plm.description.to_dict()}

        return told(opened)

    def ask(self, function: Callable[..., Answer], *arguments: Any) -> Answer:  # noqa: ANN401
        """Return what a function of the PLM returns."""
        return told(lambda: function(self._opened, *arguments))

    def work(self, begin: Begin, job: Any, *arguments: Any) -> Answer:  # noqa: ANN401
        """Do one unit of a job's work; what the job needs is prepared once for all units in a row."""

        def done() -> Answer:
            if self._prepared is None or self._prepared[:2] != (begin, job):
                self._prepared = None
                self._job.close()
                self._prepared = begin, job, self._job.enter_context(begin(self._opened, job))
            return self._prepared[2](*arguments)

        return told(done)

    @property
    def _opened(self) -> PLM:
        assert self._plm is not None, "the PLM is not open"
        return self._plm


def told(compute: Callable[[], Answer]) -> Answer:
    """Return what a function returns, or the error that it raises."""
    try:
        return compute()
    except PemaError as error:
        kinds = [kind.__name__ for kind in type(error).__mro__ if kind.__module__ == errors.__name__]
        return {"error": kinds[0], "text": str(error)}


def value(answer: Answer) -> Answer:
    """Return an answer of a worker, or raise the error that it is.

    Raises:
        PemaError: of the type that was raised there.
    """
    if "error" in answer:
        kind: type[PemaError] = getattr(errors, answer["error"])
        raise kind(answer["text"])
    return answer
