"""A training on a Ray cluster: Ray Train starts and connects the workers, and each of them runs `pema.train`.

A worker is one of several processes as a launcher starts them (`pema.processes`): the batches, the losses and the files
are those of one process. If a worker dies, all are started again, and continue from the last checkpoint.
"""

from __future__ import annotations

import contextlib
import os
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from pathlib import Path
from typing import Any

from pema import __version__, console, errors
from pema.adapter.config import TrainConfig
from pema.adapter.module import Adapter
from pema.adapter.training import train
from pema.cluster.config import EngineConfig
from pema.cluster.connection import connected, last_line, resources, wanted
from pema.errors import ConfigError, MismatchError, PemaError, ProcessError
from pema.extras import installs
from pema.files import TEMPORARY, remove
from pema.locks import exclusive, locked
from pema.memory.places import read_manifest
from pema.memory.reader import Memory
from pema.processes import TIMEOUT, join, require_single
from pema.relay import Relay, Repeater
from pema.storage.address import is_address, shown

RESTARTS = 3
"""Number of times that the workers are started again after one of them has died, before the training ends."""

SECONDS = 30.0
"""Time after which the user is told what the workers wait for, and in which workers end that are stopped."""

MARK = f"ray{TEMPORARY}"
"""Folder in that of the adapter while a training runs: a worker that sees it sees the folder of the command."""


def train_on_ray(
    memory: Path | str,
    config: TrainConfig,
    output: Path | str,
    *,
    workers: int | None = None,
    address: str | None = None,
    resume: bool = False,
    tensorboard: bool = False,
) -> tuple[Adapter, dict[str, Any]]:
    """Train an adapter with several workers on a Ray cluster, and write it to `output`; see `pema.train`.

    The adapter is that of one process, and so are its checkpoints: a training that was killed is resumed on a cluster,
    with another number of workers, by a launcher or in one process.

    Args:
        memory: the folder of the external memory, which all machines see at this path, or its address in object
            storage, which each worker copies to its machine's cache.
        config: the settings.
        output: the adapter's folder, which all machines see at this path, or its address in object storage.
        workers: number of workers; by default one for each GPU if there are any (and `device` is not "cpu"), else one
            for each machine.
        address: address of the cluster; None is that in RAY_ADDRESS, or else Ray is started on this machine. A program
            that has called `ray.init` stays connected to its cluster.
        resume: continue from the checkpoint that a killed run left; see `pema.train`.
        tensorboard: log for TensorBoard as well.

    Returns:
        The adapter with the lowest held-out loss (the last one if nothing is held out), and its figures.

    Raises:
        ConfigError: Ray is not installed; a setting is invalid; `dp_epsilon`; a worker does not see the memory or the
            folder of the adapter.
        MismatchError: a worker has another version of pema.
        ProcessError: the cluster cannot be reached, or its workers died again and again; the last checkpoint is kept.
        PemaError: as `pema.train`, from a worker.
    """
    require_single("a training with engine='ray'")
    EngineConfig("ray", workers, address)
    if config.dp_epsilon is not None:
        raise ConfigError("dp_epsilon with engine='ray': private training runs in one process. Omit engine.")
    memory, output = _absolute(memory), _absolute(output)
    manifest = read_manifest(memory)
    config.require_suited(manifest.plm)
    job = {
        "version": __version__,
        "memory": memory,
        "digest": manifest.to_dict()["digest"],
        "config": config.to_dict(),
        "output": output,
        "tensorboard": tensorboard,
    }
    with _marked(output), connected(address) as nodes:
        gpus = any(node.get("GPU") for node in nodes)
        on_gpu = gpus if config.device == "auto" else config.device != "cpu"
        count, each = resources(nodes, workers, on_gpu, f"device={config.device!r}")
        figures = _Run(job | {"on_gpu": on_gpu}, count, each).to_the_end(resume)
    return Adapter.from_pretrained(output), figures


def work(job: dict[str, Any]) -> dict[str, Any]:
    """Train in one of the workers, and return the figures of the training.

    Raises:
        PemaError: what ended the training; of a type in `pema.errors` itself, so that Ray can send it.
    """
    try:
        if not job["on_gpu"]:
            os.environ["ACCELERATE_USE_CPU"] = "true"
        processes = join()
        if processes.is_writer:
            job["news"].put([])  # the workers have begun
            console.redirect(Relay(job["news"].put))
        _require_seen(job, f"worker {processes.rank} on {socket.gethostname()}")
        if job["restarted"] and processes.is_writer and not is_address(job["output"]):
            with locked(Path(job["output"])):
                pass  # the writer of the last attempt has ended
        memory, config = Memory.open(job["memory"]), TrainConfig.from_dict(job["config"])
        _, figures = train(memory, config, job["output"], resume=job["resume"], tensorboard=job["tensorboard"])
    except PemaError as error:
        kind = next(each for each in type(error).__mro__ if each.__module__ == errors.__name__)
        raise kind(str(error)) from None
    return figures


def _require_seen(job: dict[str, Any], worker: str) -> None:
    """Refuse a worker that would train with other code or another memory, or write elsewhere."""
    if job["version"] != __version__:
        raise MismatchError(
            f"{worker} has pema {__version__}, the command {job['version']}: install the same on all machines."
        )
    remedy = "the machines of a training need a file system that they share, or an address in object storage."
    try:
        digest = read_manifest(job["memory"]).to_dict()["digest"]
    except PemaError:
        if is_address(job["memory"]):
            raise
        digest = None
    if digest != job["digest"]:
        raise ConfigError(f"{worker} does not see the memory {shown(job['memory'])}: {remedy}")
    if not is_address(job["output"]) and not (Path(job["output"]) / MARK).exists():
        raise ConfigError(f"{worker} does not see the folder {job['output']} of this command: {remedy}")


def _absolute(place: Path | str) -> str:
    return str(place) if is_address(place) else str(Path(place).absolute())


@contextlib.contextmanager
def _marked(output: str) -> Iterator[None]:
    """Mark the folder of the adapter while the block runs; it is created, and removed if nothing is written to it."""
    if is_address(output):
        yield
        return
    folder = Path(output)
    new = not folder.exists()
    with exclusive(folder / MARK):
        try:
            yield
        finally:
            remove(folder / MARK)
            if new:
                with contextlib.suppress(OSError):
                    folder.rmdir()


class _Run:
    """One training on a cluster, in the process of the user's command."""

    def __init__(self, job: dict[str, Any], count: int, each: dict[str, Any]) -> None:
        """Prepare a training.

        Args:
            job: what every worker is told (JSON).
            count: number of workers.
            each: what each takes: num_cpus, num_gpus.

        Raises:
            ConfigError: the libraries of Ray Train are not installed.
        """
        try:
            import ray
            from ray import train as ray_train
            from ray.train import torch as ray_torch
            from ray.util import queue as ray_queue
            from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
        except ImportError as error:
            raise ConfigError(f"engine='ray' needs libraries that are not installed: {installs('ray')}.") from error
        self._ray, self._train, self._torch, self._queue = ray, ray_train, ray_torch, ray_queue
        # What the workers tell is kept on the machine of the command: it cannot be lost with another.
        self._here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        self._job, self._count, self._each = job, count, each

    def to_the_end(self, resume: bool) -> dict[str, Any]:
        """Train, again and again if workers die; return the figures.

        Raises:
            PemaError: see `train_on_ray`.
        """
        for restarts in range(RESTARTS + 1):
            try:
                return self._attempt(resume or restarts > 0, restarts > 0)
            except (self._train.TrainingFailedError, self._ray.exceptions.RayError) as error:
                for failure in getattr(error, "worker_failures", {}).values():
                    if isinstance(failure, PemaError) and not isinstance(failure, ProcessError):
                        raise failure from None
                died, cause = last_line(error), error
            if restarts < RESTARTS:
                console.note(f"A worker has ended, and all continue from the last checkpoint: {died}")
        raise ProcessError(f"workers of the Ray cluster have ended {RESTARTS + 1} times, at last: {died}") from cause

    def _attempt(self, resume: bool, restarted: bool) -> dict[str, Any]:
        """Start the workers, and print what the first one tells until they have ended."""
        on_gpu = self._job["on_gpu"]
        news = self._queue.Queue(actor_options={"num_cpus": 0, "scheduling_strategy": self._here})
        with tempfile.TemporaryDirectory(prefix="pema-ray-") as folder, Repeater() as repeat:
            trainer = self._torch.TorchTrainer(
                work,
                train_loop_config=self._job | {"resume": resume, "restarted": restarted, "news": news},
                torch_config=self._torch.TorchConfig(timeout_s=int(TIMEOUT.total_seconds())),
                scaling_config=self._train.ScalingConfig(
                    num_workers=self._count,
                    use_gpu=on_gpu,
                    resources_per_worker={"CPU": self._each["num_cpus"]} | ({"GPU": 1} if on_gpu else {}),
                    placement_strategy="SPREAD",
                ),
                run_config=self._train.RunConfig(
                    name="training",
                    storage_path=folder,  # of Ray's own files; checkpoints are not given to Ray
                    failure_config=self._train.FailureConfig(max_failures=0, max_preemption_failures=0),
                ),
            )
            ended = _started(trainer.fit)
            try:
                self._listen(news, repeat, ended)
                figures: dict[str, Any] = ended.result().return_value
                return figures
            finally:
                # The writer cannot go on without it, if the user has stopped the command: the workers end.
                news.shutdown(force=True)
                wait([ended], SECONDS)

    def _listen(self, news: Any, repeat: Repeater, ended: Future[Any]) -> None:  # noqa: ANN401
        """Print what the first worker tells, until all have ended."""
        heard, since = False, time.monotonic()
        while not (ended.done() and news.empty()):
            with contextlib.suppress(self._queue.Empty):
                repeat(news.get(timeout=0.5))
                heard = True
            if not heard and time.monotonic() - since > SECONDS:
                since = time.monotonic()
                console.note(f"waiting for {self._count} workers of the Ray cluster to begin; {wanted(self._each)}")


def _started(function: Callable[[], Any]) -> Future[Any]:
    """Call a function in a thread, which ends with the process at the latest."""
    future: Future[Any] = Future()

    def run() -> None:
        try:
            future.set_result(function())
        except Exception as error:
            future.set_exception(error)

    threading.Thread(target=run, name="pema-ray", daemon=True).start()
    return future
