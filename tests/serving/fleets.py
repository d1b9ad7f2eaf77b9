"""A router with workers that run in the process: real sockets, real applications, and a PLM for each."""

import contextlib
import secrets
import tempfile
import threading
import time
from pathlib import Path

import httpx2
import uvicorn

from pema.serving.app import create_app
from pema.serving.connections import Connections
from pema.serving.policy import Limits, Policy
from pema.serving.router import create_router
from pema.serving.server import Address, configuration
from pema.serving.service import Service
from pema.serving.store import Store
from pema.serving.workers import Fleet, Worker


class Thread:
    """What a `Worker` needs of its process, here a thread with a server of uvicorn."""

    stdin = None

    def __init__(self, app, path):
        self.app = app
        self.server = uvicorn.Server(uvicorn.Config(app, uds=str(path), log_config=None))
        self.thread = threading.Thread(target=self.server.run, daemon=True)
        self.thread.start()

    def poll(self):
        return None if self.thread.is_alive() else 0

    def terminate(self):
        self.server.should_exit = True

    def kill(self):
        """End at once: close the connections and listen no more."""
        self.server.force_exit = self.server.should_exit = True
        self.wait(30)

    def wait(self, seconds=None):
        self.thread.join(seconds)
        assert not self.thread.is_alive()


class Plan:
    """What the workers of the process run; see `pema.serving.workers.Plan`."""

    def __init__(self, plms, policy, folder, path):
        self.environments, self.started = [{}] * len(plms), []
        self._plms, self._folder, self.policy = plms, folder, path
        self.store = folder / "quotas.sqlite" if policy.quota_file is None else Path(policy.quota_file)

    def start(self, index, rules, number):
        name = secrets.token_hex(4)
        path = self._folder / f"{name}.sock"

        def load(metrics):
            return Service(self._plms[index], rules, metrics, Store(self.store), name)

        self.started.append(index)
        process = Thread(create_app(load, policy=self.policy, number=number), path)
        return Worker(index, name, process, httpx2.AsyncHTTPTransport(uds=str(path), trust_env=False))


@contextlib.contextmanager
def routed(plms, policy=None, *, path=None, local_only=False, ready=None, **limits):
    """A router whose workers are ready: its address and its fleet."""
    policy = policy or Policy(limits=Limits(**limits))
    address, connections = Address(port=0), Connections(policy.limits.connections)
    with tempfile.TemporaryDirectory(prefix="pema-") as folder:
        plan = Plan(plms, policy, Path(folder), path)
        fleet = Fleet(plan, Store(plan.store), policy, connections)
        listener = address.listen()
        listener.connections = connections
        app = create_router(fleet, connections, local_only=local_only)
        server = uvicorn.Server(configuration(app, address))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            until(lambda: len(fleet.ready) == (len(plms) if ready is None else ready) or not thread.is_alive())
            yield address.url(listener), fleet
        finally:
            server.should_exit = True
            thread.join(60)
            assert not thread.is_alive()


def until(condition, seconds=60):
    """Wait for a condition."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)
