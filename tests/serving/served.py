"""A served tiny PLM, in the process."""

import contextlib
import socket
import threading
import time

import httpx2
import uvicorn
from starlette.testclient import TestClient

from pema.owner.wire import unpack
from pema.serving.app import create_app
from pema.serving.connections import Connections
from pema.serving.keys import digest
from pema.serving.policy import Key, Limits, Policy
from pema.serving.server import Address, configuration
from pema.serving.service import Service

KEYS = {name: f"pema_test-key-of-{name}" for name in ("acme", "other", "spare")}


def key(name="acme", **settings):
    return Key(name=name, sha256=digest(KEYS[name]), **settings)


def bearer(name="acme"):
    return {"Authorization": f"Bearer {KEYS[name]}"}


def tensors(response, status=200):
    """The tensors and texts of an answer that must be good."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/vnd.safetensors"
    return unpack(response.content)


def refusal(response, status, code):
    """The error of an answer that must be this one."""
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"code", "message", "remedy"}
    assert error["code"] == code
    assert error["message"]
    assert error["remedy"]
    return error


def opened(client, prompts, **more):
    """A new session: its representations and its path."""
    found, texts = tensors(client.post("/v1/sessions", json={"prompts": prompts, **more}), 201)
    return found["representations"], f"/v1/sessions/{texts['session']}"


@contextlib.contextmanager
def served(plm, policy=None, *, local_only=False, **limits):
    """A client of a server that is ready."""
    policy = policy or Policy(limits=Limits(**limits))
    app = create_app(lambda metrics: Service(plm, policy, metrics), local_only=local_only)
    with TestClient(app) as client:
        deadline = time.monotonic() + 30
        while client.get("/readyz", headers={"Host": "localhost"}).status_code != 200:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        yield client


@contextlib.contextmanager
def listening(plm, policy=None, *, buffer=None, path=None, **limits):
    """A server that is ready on a port of the loopback, in a thread: its address and its application.

    `buffer` is what the system keeps of an answer that is not read, in bytes.
    """
    policy = policy or Policy(limits=Limits(**limits))
    address, connections = Address(port=0), Connections(policy.limits.connections)
    app = create_app(lambda metrics: Service(plm, policy, metrics), connections, policy=path)
    listener = address.listen()
    if buffer is not None:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, buffer)
    listener.connections = connections
    server = uvicorn.Server(configuration(app, address))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        url = address.url(listener)
        deadline = time.monotonic() + 30
        while httpx2.get(f"{url}/readyz").status_code != 200:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        yield url, app
    finally:
        server.should_exit = True
        thread.join(30)
        assert not thread.is_alive()
