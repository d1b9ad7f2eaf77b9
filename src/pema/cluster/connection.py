"""The connection to a Ray cluster, and what each worker takes of it."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator, Mapping
from typing import Any

from pema.errors import ConfigError, ProcessError
from pema.extras import require_library

LONGEST = 300
"""Maximum length of what a message repeats of an error of Ray."""


@contextlib.contextmanager
def connected(address: str | None) -> Iterator[list[dict[str, float]]]:
    """Connect with a Ray cluster while the block runs, and yield the resources of its machines, by Ray's names.

    Args:
        address: its address; None is that in RAY_ADDRESS, or else Ray is started on this machine. A program that has
            called `ray.init` stays connected to its cluster.

    Raises:
        ConfigError: Ray is not installed.
        ProcessError: the cluster cannot be reached.
    """
    require_library("engine='ray'", "ray", "ray")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # Ray reports to its maker otherwise
    import ray

    own = not ray.is_initialized()
    if own:
        try:
            with _own_signals():
                ray.init(address=address, log_to_driver=False, logging_level="ERROR", include_dashboard=None)
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise ProcessError(
                f"the Ray cluster at {address or os.environ.get('RAY_ADDRESS', 'this machine')} cannot be used: "
                f"{last_line(error)}"
            ) from error
    try:
        yield [node["Resources"] for node in ray.nodes() if node["Alive"]]
    finally:
        if own:
            ray.shutdown()


@contextlib.contextmanager
def _own_signals() -> Iterator[None]:
    """Restore what this process does on signals after the block; Ray would print a stack and abort on SIGTERM."""
    numbers = (signal.SIGINT, signal.SIGTERM) if threading.current_thread() is threading.main_thread() else ()
    before = {number: signal.getsignal(number) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            if handler is not None:  # not Python's
                signal.signal(number, handler)


def resources(
    nodes: list[dict[str, float]], workers: int | None, on_gpu: bool, setting: str
) -> tuple[int, dict[str, Any]]:
    """Return the number of workers, and what each takes of a cluster's machines.

    A worker runs on one machine, so what each takes is chosen so that all of them have a place at the same time.

    Args:
        nodes: the resources of each machine, by Ray's names.
        workers: the number of workers; None is one for each GPU, or for each machine with CPUs.
        on_gpu: whether each takes a GPU.
        setting: the setting that says so, for the message.

    Raises:
        ConfigError: they take GPUs, and there are none.
    """
    places = [(int(node.get("CPU", 0)), int(node.get("GPU", 0))) for node in nodes]
    gpus = sum(on_node for _, on_node in places)
    if on_gpu and not gpus:
        raise ConfigError(f"{setting} is set, but the machines of the Ray cluster have no GPU: omit it.")
    usable = [(cpus, on_node) for cpus, on_node in places if cpus and (on_node or not on_gpu)]
    count = workers or (gpus if on_gpu else max(1, len(usable)))
    most = min((cpus for cpus, _ in usable), default=1)

    def fitting(each: int) -> int:
        return sum(min(cpus // each, on_node) if on_gpu else cpus // each for cpus, on_node in usable)

    each = next((n for n in range(most, 1, -1) if fitting(n) >= count), 1)
    return count, {"num_cpus": each, "num_gpus": 1 if on_gpu else 0, "scheduling_strategy": "SPREAD"}


def wanted(each: Mapping[str, Any]) -> str:
    """Return what each worker takes of the cluster, and how much of it is free, for a note that workers wait.

    Args:
        each: as `resources` returns it.
    """
    import ray

    free = ray.available_resources()
    return (
        f"each takes {each['num_cpus']} CPUs and {each['num_gpus']} GPUs, of which {free.get('CPU', 0):g} and "
        f"{free.get('GPU', 0):g} are free."
    )


def last_line(error: Exception) -> str:
    """Return the last line of what an error of Ray says: the cause comes after the names of the parts."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return lines[-1] if len(lines[-1]) <= LONGEST else f"{lines[-1][:LONGEST]} ..."
