"""Replicas of a PLM for the length of a block: the connection to the Ray cluster, and what each takes of it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from pema.cluster.config import EngineConfig
from pema.cluster.replicas import Replicas, last_line
from pema.errors import ConfigError, ProcessError
from pema.extras import require_library
from pema.owner.contract import PLM
from pema.owner.opening import open_plm


@contextlib.contextmanager
def replicas(
    plm: str | Callable[[], PLM],
    *,
    workers: int | None = None,
    address: str | None = None,
    **loading: Any,  # noqa: ANN401
) -> Iterator[Replicas]:
    """Start replicas of a PLM on a Ray cluster, which end with the block.

    `build_memory`, `generate` and `tune` accept them as the PLM.

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
                f"{last_line(error)}"
            ) from error
    try:
        on_gpu = loading.get("device_map") not in (None, "cpu")
        count, options = resources([node["Resources"] for node in ray.nodes() if node["Alive"]], workers, on_gpu)
        pool = Replicas(partial(open_plm, plm, **loading) if isinstance(plm, str) else plm, count, options)
        try:
            yield pool
        finally:
            pool.close()
    finally:
        if own:
            ray.shutdown()


@contextlib.contextmanager
def opened(plm: str, engine: EngineConfig, **loading: Any) -> Iterator[PLM | Replicas]:  # noqa: ANN401
    """Open a PLM by name where the settings say: in this process, or as `replicas`; see there and `open_plm`."""
    if engine.engine == "ray":
        with replicas(plm, workers=engine.workers, address=engine.address, **loading) as pool:
            yield pool
    else:
        yield open_plm(plm, **loading)


def resources(nodes: list[dict[str, float]], workers: int | None, on_gpu: bool) -> tuple[int, dict[str, Any]]:
    """Return the number of replicas, and what each takes of a cluster's machines.

    Args:
        nodes: the resources of each machine, by Ray's names.
        workers: the number of replicas; None for the default.
        on_gpu: whether each takes a GPU.

    Raises:
        ConfigError: they take GPUs, and there are none.
    """
    gpus = sum(int(node.get("GPU", 0)) for node in nodes)
    if on_gpu and not gpus:
        raise ConfigError("device_map is set, but the machines of the Ray cluster have no GPU: omit it.")
    count = workers or (gpus if on_gpu else len(nodes))
    cpus = [int(node.get("CPU", 0)) for node in nodes]
    each = max(1, min(sum(cpus) // count, min((n for n in cpus if n), default=1)))
    return count, {"num_cpus": each, "num_gpus": 1 if on_gpu else 0, "scheduling_strategy": "SPREAD"}
