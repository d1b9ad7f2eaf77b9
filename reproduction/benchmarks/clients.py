"""Clients that load a server: threads of one process, each of which sends requests one after the other."""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from reproduction.benchmarks.timing import significant

Request = Callable[[int], int]
"""Makes the k-th request and returns the number of representations in the answer."""


@dataclass(frozen=True)
class Load:
    """What the clients of a server measured.

    Attributes:
        latencies: seconds of each request.
        representations: number of representations in all answers.
        seconds: time from the first request to the last answer.
    """

    latencies: list[float]
    representations: int
    seconds: float

    def per_second(self, count: float) -> float:
        """Return a rate, of so many in the measured time."""
        return significant(count / self.seconds)

    def latency_ms(self, percentile: int) -> float:
        """Return a percentile, 1 to 99, of the latencies in milliseconds."""
        return significant(1e3 * statistics.quantiles(self.latencies, n=100)[percentile - 1])


def load(connect: Callable[[int], Request], clients: int, seconds: float) -> Load:
    """Let a number of clients send requests continuously.

    Args:
        connect: is called in the thread of each client with its number, and returns what makes its requests.
        clients: number of clients.
        seconds: time in which requests begin; each client makes at least two.
    """
    latencies: list[float] = []
    representations = 0
    lock = threading.Lock()

    def client(number: int) -> None:
        nonlocal representations
        request, k = connect(number), number
        while time.perf_counter() < begun + seconds or k < 2 * clients:
            started = time.perf_counter()
            count = request(k)
            with lock:
                latencies.append(time.perf_counter() - started)
                representations += count
            k += clients

    threads = [threading.Thread(target=client, args=(number,)) for number in range(clients)]
    begun = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return Load(latencies, representations, time.perf_counter() - begun)
