"""Replicas of a PLM on a Ray cluster for the length of a block."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from pema.cluster.config import EngineConfig
from pema.cluster.connection import connected, resources
from pema.cluster.replicas import Replicas
from pema.errors import ConfigError
from pema.owner.config import LoadConfig
from pema.owner.contract import PLM
from pema.owner.opening import open_plm
from pema.schema import known


@contextlib.contextmanager
def replicas(
    plm: str | Callable[[], PLM],
    *,
    workers: int | None = None,
    address: str | None = None,
    **loading: Any,  # noqa: ANN401
) -> Iterator[Replicas]:
    """Start replicas of a PLM on a Ray cluster, which end with the block.

    `build_memory`, `generate`, `classify` and `tune` accept them as the PLM.

    Args:
        plm: its name or address, as `open_plm` takes it, in the workers; or a function that opens it there.
        workers: number of replicas; by default one for each GPU if `device_map` is set, else one for each machine.
        address: address of the cluster; None is that in RAY_ADDRESS, or else Ray is started on this machine. A program
            that has called `ray.init` stays connected to its cluster.
        loading: fields of `LoadConfig`; with a function `device_map` alone, which says whether it uses a GPU.

    Raises:
        ConfigError: Ray is not installed; a setting is invalid, or has no effect with a function.
        ProcessError: the cluster cannot be reached, or its workers have died.
        PemaError: the PLM cannot be opened.
    """
    EngineConfig("ray", workers, address)
    known(LoadConfig, loading)
    LoadConfig(**loading)
    idle = [name for name in loading if name != "device_map"]
    if idle and not isinstance(plm, str):
        raise ConfigError(
            f"{idle[0]}={loading[idle[0]]} has no effect with a function, which opens the PLM itself: give it there."
        )
    with connected(address) as nodes:
        on_gpu = loading.get("device_map") not in (None, "cpu")
        count, options = resources(nodes, workers, on_gpu, "device_map")
        pool = Replicas(partial(open_plm, plm, **loading) if isinstance(plm, str) else plm, count, options)
        try:
            yield pool
        finally:
            pool.close()


@contextlib.contextmanager
def opened(plm: str, engine: EngineConfig, **loading: Any) -> Iterator[PLM | Replicas]:  # noqa: ANN401
    """Open a PLM by name where the settings say: in this process, or as `replicas`; see there and `open_plm`."""
    if engine.engine == "ray":
        with replicas(plm, workers=engine.workers, address=engine.address, **loading) as pool:
            yield pool
    else:
        yield open_plm(plm, **loading)
