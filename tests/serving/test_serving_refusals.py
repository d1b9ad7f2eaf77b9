"""Refusals of wrong requests: a clear 4xx, never a 5xx, and never the client's own text."""

import json
import threading
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from served import bearer, key, refusal, served
from starlette.testclient import TestClient

from pema.serving import bodies
from pema.serving.app import create_app
from pema.serving.policy import Limits, Policy
from pema.serving.service import Service

GOOD = {"sequences": [[1, 2, 3]], "starts": [1]}
JSON = {"Content-Type": "application/json"}


@pytest.fixture(scope="module")
def small(plm):
    with served(plm, body_bytes=2000) as client:
        yield client


@pytest.fixture(scope="module")
def guarded(plm):
    keys = (
        key("acme", contexts=("predicted",), head="none", requests_per_second=1000.0),
        key("other", endpoints=("plm", "represent"), taps=("norm_input",)),
        key("spare", requests_per_second=0.01, tokens_per_day=10),
    )
    with served(plm, Policy(keys=keys)) as client:
        yield client


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Authorization": "Bearer wrong"},
        {"Authorization": "Bearer "},
        {"Authorization": "Basic YTpi"},
        {"Authorization": bearer()["Authorization"].removeprefix("Bearer ")},
        {"Authorization": "Bearer \xff".encode("latin-1")},
    ],
)
def test_without_a_known_key(guarded, headers):
    answer = guarded.post("/v1/represent", json=GOOD, headers=headers)
    refusal(answer, 401, "unknown_key")
    assert answer.headers["WWW-Authenticate"] == "Bearer"


def test_what_the_policy_does_not_let_a_key_do(guarded):
    for name, method, path, body, said in (
        ("acme", "POST", "/v1/represent", GOOD, "may not have teacher contexts"),
        ("acme", "GET", "/metrics", None, "may not use metrics"),
        ("other", "POST", "/v1/predict", {"prompts": [[1]], "steps": [8]}, "may not use predict"),
        ("other", "POST", "/v1/represent", GOOD, "tap is head_input, which this key may not use"),
        ("other", "GET", "/v1/head", None, "may not use head"),
        ("other", "DELETE", "/v1/sessions/x", None, "may not use sessions"),
    ):
        answer = guarded.request(method, path, json=body, headers=bearer(name))
        assert said in refusal(answer, 403, "not_allowed")["message"]
    refusal(guarded.get("/v1/head", headers=bearer("acme")), 403, "head_withheld")
    about = guarded.get("/v1/plm", headers=bearer("acme")).json()
    assert (about["contexts"], about["head"], about["taps"]) == (["predicted"], "none", ["head_input"])
    assert guarded.get("/v1/plm", headers=bearer("other")).json()["taps"] == []


def test_quotas(guarded):
    body = {"sequences": [[1, 2, 3] * 4], "starts": [1]}
    answer = guarded.post("/v1/represent", json=body, headers=bearer("spare"))
    assert "12 tokens are requested" in refusal(answer, 413, "larger_than_quota")["message"]
    answer = guarded.post("/v1/represent", json=GOOD, headers=bearer("spare"))
    refusal(answer, 429, "too_many_requests")
    assert 90 <= int(answer.headers["Retry-After"]) <= 100


@pytest.mark.parametrize("path", ["/v1/represent", "/v1/predict", "/v1/sessions", "/v1/sessions/some/advance"])
@pytest.mark.parametrize(
    ("content", "code"),
    [
        (b"", "invalid_json"),
        (b"{", "invalid_json"),
        (b"\xff\xfe", "invalid_json"),
        (b"[" * 200, "invalid_json"),
        (b"NaN", "invalid"),
        (b"null", "invalid"),
        (b"[]", "invalid"),
        (b"{}", "invalid"),
        (b'{"sequences": [[1, "2"]], "prompts": [[1.5]], "starts": [1], "steps": [8]}', "invalid"),
        (b'{"sequences": [[-1]], "prompts": [[true]], "starts": [1], "steps": [8]}', "invalid"),
        (b'{"sequences": [[' + b"9" * 400 + b']], "prompts": [[99999999999999999999]], "starts": [1]}', "invalid"),
        (b'{"sequences": [], "prompts": [], "starts": [], "steps": [], "tokens": []}', "invalid"),
    ],
)
def test_malformed_bodies(small, path, content, code):
    refusal(small.post(path, content=content, headers=JSON), 422, code)


def test_what_was_sent_is_not_sent_back(small):
    for content in (
        b'{"sequences": "my secret prompt", "starts": [1]}',
        b'{"sequences": [["my secret prompt"]], "starts": [1]}',
        b'{"sequences": [[1, 2]], "starts": [1], "dtype": "my secret prompt"}',
        b'{"my secret prompt": 3}',
        b'{"sequences": [[1, 2]], "starts": [1], "my secret prompt": 3}',
        b"my secret prompt",
    ):
        assert "secret" not in small.post("/v1/represent", content=content, headers=JSON).text


def test_other_content_types_are_not_read(small):
    for headers in ({"Content-Type": "text/plain"}, {"Content-Type": "application/vnd.safetensors"}):
        answer = small.post("/v1/represent", content=json.dumps(GOOD).encode(), headers=headers)
        refusal(answer, 415, "not_json")
    headers = {"Content-Type": "Application/JSON; charset=utf-8"}
    assert small.post("/v1/represent", content=json.dumps(GOOD).encode(), headers=headers).status_code == 200


def test_a_large_body_is_refused_by_its_length_or_while_it_comes(small):
    body = json.dumps({"sequences": [[1] * 2000], "starts": [1]}).encode()
    assert (
        "larger than 2000 bytes"
        in refusal(small.post("/v1/represent", content=body, headers=JSON), 413, "body_too_large")["message"]
    )
    received = []

    async def app(scope, receive, send):
        async def endless():
            received.append(1)
            return {"type": "http.request", "body": b" " * 500, "more_body": True}

        scope["headers"] = [header for header in scope["headers"] if header[0] != b"content-length"]
        await small.app(scope, endless, send)

    refusal(TestClient(app).post("/v1/represent", json=GOOD), 413, "body_too_large")
    assert len(received) == 5


def test_a_body_that_does_not_come_is_not_waited_for(small, monkeypatch):
    monkeypatch.setattr(bodies, "BODY_SECONDS", 0.1)

    async def app(scope, receive, send):
        async def never():
            import asyncio

            await asyncio.sleep(60)

        await small.app(scope, never, send)

    refusal(TestClient(app).post("/v1/represent", json=GOOD), 408, "slow_body")


def test_a_client_that_leaves_is_no_failure_of_the_server(small, caplog):
    async def app(scope, receive, send):
        async def left():
            return {"type": "http.disconnect"}

        await small.app(scope, left, send)

    refusal(TestClient(app).post("/v1/represent", json=GOOD), 400, "disconnected")
    assert "a request failed" not in caplog.text


def test_unknown_paths_and_methods(small):
    refusal(small.get("/v2/plm"), 404, "no_such_endpoint")
    answer = small.get("/v1/predict")
    refusal(answer, 405, "no_such_endpoint")
    assert answer.headers["Allow"] == "POST"
    refusal(small.delete("/v1/sessions/" + "x" * 65), 422, "invalid")


@settings(max_examples=25, deadline=None)
@given(st.sampled_from(["represent", "predict", "sessions", "sessions/some/advance"]), st.data())
def test_any_json_is_answered_without_a_5xx(small, path, data):
    names = st.sampled_from(["sequences", "starts", "prompts", "steps", "tokens", "parents", "step", "dtype", "x"])
    leaves = st.none() | st.booleans() | st.integers(-2, 2**40) | st.floats() | st.text(max_size=5)
    values = st.recursive(leaves, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(names, inner, max_size=3))
    body = json.dumps(data.draw(st.dictionaries(names, values, max_size=5)))
    answer = small.post(f"/v1/{path}", content=body.encode(), headers=JSON)
    assert answer.status_code < 500


def test_until_the_plm_is_loaded_everything_is_told_to_wait(plm):
    go = threading.Event()

    def load(metrics):
        assert go.wait(10)
        return Service(plm, Policy(), metrics)

    with TestClient(create_app(load)) as client:
        for path in ("/readyz", "/v1/plm", "/metrics"):
            answer = client.get(path)
            refusal(answer, 503, "loading")
            assert answer.headers["Retry-After"] == "5"
        assert client.get("/healthz").status_code == 200
        go.set()
        while client.get("/readyz").status_code != 200:
            time.sleep(0.01)
        client.app.state.lifecycle.draining = True
        for path in ("/readyz", "/v1/plm"):
            refusal(client.get(path), 503, "draining")
        assert client.get("/healthz").status_code == 200


def test_a_plm_that_cannot_be_loaded_is_not_healthy():
    def load(metrics):
        raise ValueError("a broken checkpoint")

    with TestClient(create_app(load)) as client:
        while client.app.state.lifecycle.failure is None:
            time.sleep(0.01)
        refusal(client.get("/healthz"), 503, "broken")
        refusal(client.get("/readyz"), 503, "loading")


@pytest.mark.parametrize("place", ["represent", "a context"])
def test_no_memory_left_on_the_device(client, monkeypatch, plm, place):
    import torch

    from pema.owner.local.running import Runner

    def full(*_, **__):
        raise torch.OutOfMemoryError("full")

    if place == "represent":
        monkeypatch.setattr(plm, "represent", full)
    else:
        client.post("/v1/represent", json=GOOD)  # the shortcuts are chosen
        monkeypatch.setattr(Runner, "teacher", full)
    answer = client.post("/v1/represent", json=GOOD)
    refusal(answer, 503, "no_room")
    assert answer.headers["Retry-After"] == "1"


def test_a_queue_that_is_full(plm, monkeypatch):
    with served(plm, Policy(limits=Limits(queue_requests=1))) as client:
        batcher = client.app.state.lifecycle.service().batcher
        go, running = threading.Event(), threading.Event()
        batcher.call(lambda: (running.set(), go.wait(10)), key="x", tokens=0)
        assert running.wait(10)
        batcher.call(lambda: None, key="x", tokens=0)
        refusal(client.post("/v1/represent", json=GOOD), 503, "busy")
        go.set()
