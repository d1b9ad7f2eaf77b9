"""What is read while the accelerator computes on what was read before."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

Item = TypeVar("Item")

AHEAD = 2
"""Number of items that are ready, or being prepared, beside the current one."""


def prefetch(items: Iterator[Item]) -> Iterator[Item]:
    """Yield the items of an iterator, which runs in a thread and is at most `AHEAD` items ahead.

    An exception of the iterator is raised where its item would have been.
    """
    with ThreadPoolExecutor(1, thread_name_prefix="prefetch") as thread:
        pending: deque[Future[list[Item]]] = deque()
        try:
            while True:
                while len(pending) <= AHEAD:
                    pending.append(thread.submit(lambda: list(islice(items, 1))))
                current = pending.popleft().result()
                if not current:
                    return
                yield current[0]
        finally:
            for each in pending:
                each.cancel()
