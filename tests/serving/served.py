"""A served tiny PLM, in the process."""

import contextlib
import time

from starlette.testclient import TestClient

from pema.owner.wire import unpack
from pema.serving.app import create_app
from pema.serving.keys import digest
from pema.serving.policy import Key, Limits, Policy
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
def served(plm, policy=None, **limits):
    """A client of a server that is ready."""
    policy = policy or Policy(limits=Limits(**limits))
    with TestClient(create_app(lambda metrics: Service(plm, policy, metrics))) as client:
        deadline = time.monotonic() + 30
        while client.get("/readyz").status_code != 200:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        yield client
