"""One address in front of several workers: the answers of one server, sessions that stay, and limits that hold once."""

import contextlib
import json
import socket
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import get_args
from urllib.parse import urlsplit

import httpx2
import pytest
import torch
from fleets import routed, until
from served import KEYS, bearer, key, opened, refusal, tensors
from test_serving_load import Blocked, waited
from test_serving_reload import entry

from pema.owner.client.connection import Connection
from pema.owner.client.remote import RemotePLM
from pema.serving.policy import Endpoint, Limits, Policy

GOOD = {"sequences": [[1, 5, 6, 7]], "starts": [1]}
JSON = {"Content-Type": "application/json"}


@pytest.fixture(scope="module")
def plms(tiny_plm):
    return [tiny_plm(), tiny_plm()]


@pytest.fixture(scope="module")
def policy():
    keys = key(endpoints=get_args(Endpoint)), key("other"), key("spare", requests_per_second=0.01, head="none")
    return Policy(keys=keys, limits=Limits(body_bytes=1 << 16))


@pytest.fixture(scope="module")
def server(plms, policy):
    with routed(plms, policy) as (url, fleet):
        yield url, fleet


@pytest.fixture
def client(server):
    with httpx2.Client(base_url=server[0], headers=bearer(), timeout=60) as client:
        yield client


def service(worker):
    return worker.process.app.state.lifecycle.service()


def test_answers_are_those_of_the_plm(server, plms):
    across = RemotePLM(server[0], dtype="float32", connection=Connection(server[0], key=KEYS["acme"]))
    sequences, starts = [[1, 5, 6, 7, 9, 11], [1, 5, 8], [1, 5, 6, 7] * 5], [2, 1, 9]
    for asked, expected in (
        (across.represent(sequences, starts), plms[0].represent(sequences, starts)),
        (across.predict(sequences, [3, 2, 9]), plms[0].predict(sequences, [3, 2, 9])),
    ):
        by_index = {each.index: each.representations for each in expected}
        for answer in asked:
            torch.testing.assert_close(answer.representations, by_index[answer.index], atol=1e-5, rtol=1e-5)
    assert across.head().fingerprint == plms[0].head().fingerprint
    assert across.tokenizer.get_vocab() == plms[0].tokenizer.get_vocab()
    for _ in range(3):
        session = across.open_session([[1, 5], [1, 7, 8]])
        session.advance([6, 9])
        (alone,) = plms[0].represent([[1, 5, 6, 1]], [3])
        torch.testing.assert_close(session.representations[0], alone.representations[0], atol=1e-5, rtol=1e-5)
        session.close()


def test_a_session_stays_with_the_worker_that_opened_it(server, client):
    _, fleet = server
    paths = [opened(client, [[1, 5]])[1] for _ in range(8)]
    names = Counter(path.split("/")[-1].partition("-")[0] for path in paths)
    assert names == {worker.name: 4 for worker in fleet.ready}
    for step in (1, 2):
        for path in paths:
            tensors(client.post(f"{path}/advance", json={"step": step, "tokens": [7]}))
    for name in ("", "other"):
        wrong = bearer(name) if name else {"Authorization": "Bearer wrong"}
        answer = client.post(f"{paths[0]}/advance", json={"step": 3, "tokens": [7]}, headers=wrong)
        refusal(answer, *((404, "unknown_session") if name else (401, "unknown_key")))
    for name in (f"{next(iter(names))}-guess", "12345678-guess", "guess", "-", "..%2f..%2fmetrics"):
        answer = client.post(f"/v1/sessions/{name}/advance", json={"step": 1, "tokens": [7]})
        assert answer.status_code == 404, answer.text
    for path in paths:
        assert client.delete(path).status_code == 204
    assert [len(service(worker).sessions) for worker in fleet.ready] == [0, 0]


def test_what_workers_refuse_is_passed_on_whole(client):
    answer = client.get("/v1/plm", headers={"Authorization": "Bearer wrong"})
    refusal(answer, 401, "unknown_key")
    assert answer.headers["WWW-Authenticate"] == "Bearer"
    client.get("/v1/plm", headers=bearer("spare"))
    answer = client.get("/v1/plm", headers=bearer("spare"))  # of whichever worker
    refusal(answer, 429, "too_many_requests")
    assert int(answer.headers["Retry-After"]) > 90
    refusal(client.post("/v1/represent", json={"sequences": [[1, 2]], "starts": [7]}), 422, "invalid")
    refusal(client.get("/v1/nowhere"), 404, "no_such_endpoint")
    refusal(client.put("/v1/represent"), 405, "no_such_endpoint")
    refusal(client.post("/healthz"), 405, "no_such_endpoint")
    refusal(client.post("/v1/represent", content=b" " * 70_000, headers=JSON), 413, "body_too_large")
    pieces = (b" " * 10_000 for _ in range(10))
    refusal(client.post("/v1/represent", content=pieces, headers=JSON), 413, "body_too_large")
    assert "<h1>" in client.get("/docs").text
    answer = client.get("/v1/plm?x=1")
    names = [name.lower() for name, _ in answer.headers.raw]
    assert len(set(names)) == len(names)
    assert answer.headers["x-request-id"]


def test_the_metrics_of_all_workers_are_one_page(server, client):
    for _ in range(4):
        tensors(client.post("/v1/represent", json=GOOD))
    lines = client.get("/metrics").text.splitlines()
    counts = {line.split()[0]: float(line.split()[1]) for line in lines if line.startswith("pema_key_requests_total")}
    names = {f'pema_key_requests_total{{key="acme",worker="{index}"}}' for index in (0, 1)}
    assert names <= set(counts)
    assert all(counts[name] >= 2 for name in names)
    assert sum(line == "# TYPE pema_requests_total counter" for line in lines) == 1
    answer = client.get("/metrics", headers=bearer("other"))
    refusal(answer, 403, "not_allowed")


def test_two_workers_never_give_out_more_than_one_quota(plms):
    policy = Policy(keys=(key(tokens_per_day=40), key("other", requests_per_second=5.0)), limits=Limits())
    with routed(plms, policy) as (url, fleet), ThreadPoolExecutor(12) as pool:

        def ask(name):
            return httpx2.post(f"{url}/v1/represent", json=GOOD, headers=bearer(name), timeout=60).status_code

        assert Counter(pool.map(ask, ["acme"] * 40)) == {200: 10, 429: 30}
        began = time.monotonic()
        answered = Counter(pool.map(ask, ["other"] * 40))[200]
        assert 5 <= answered <= 5 + 5 * (time.monotonic() - began) + 1
        assert {len(service(worker).accounts) for worker in fleet.ready} == {2}


def test_a_key_that_was_removed_is_refused_by_all_workers_within_a_second(plms, tmp_path):
    path = tmp_path / "policy.toml"
    path.write_text(entry("acme") + entry("other"), encoding="utf-8")
    with contextlib.ExitStack() as stack:
        url, fleet = stack.enter_context(routed(plms, Policy.read(path), path=path))
        client = stack.enter_context(httpx2.Client(base_url=url, headers=bearer("other"), timeout=60))
        sessions = [opened(client, [[1, 5]])[1] for _ in range(4)]
        path.write_text(entry("acme"), encoding="utf-8")
        fleet.request_reread()
        until(lambda: [len(service(worker).accounts) for worker in fleet.ready] == [1, 1], 30)
        for session in sessions * 2:
            answer = client.post(f"{session}/advance", json={"step": 1, "tokens": [7]})
            refusal(answer, 401, "unknown_key")
        until(lambda: [len(service(worker).sessions) for worker in fleet.ready] == [0, 0], 30)


def test_the_limit_of_connections_follows_the_policy(plms, tmp_path):
    path = tmp_path / "policy.toml"

    def text(most):
        return f"[limits]\nconnections = {most}\n" + entry("acme")

    path.write_text(text(5), encoding="utf-8")
    with routed(plms[:1], Policy.read(path), path=path) as (url, fleet), contextlib.ExitStack() as stack:
        address = urlsplit(url)
        for most, others in ((2, 3), (5, 0)):
            path.write_text(text(most), encoding="utf-8")
            fleet.request_reread()
            until(lambda most=most: fleet._connections.most == most)
            opened = [stack.enter_context(socket.create_connection((address.hostname, address.port))) for _ in range(5)]
            closed = 0
            for connection in opened:
                connection.settimeout(0.5)
                with contextlib.suppress(TimeoutError):
                    closed += connection.recv(1) == b""
            assert closed == others
            for connection in opened:
                connection.close()
        path.write_text(text(9).replace("[limits]", "[limitz]"), encoding="utf-8")
        fleet.request_reread()
        until(lambda: fleet._number == fleet._store.rereads() == 3)
        assert fleet._connections.most == 5


def test_a_worker_that_is_started_again_does_not_read_a_file_that_nobody_asked_to_reread(plms, tmp_path, monkeypatch):
    monkeypatch.setattr("pema.serving.workers.FIRST_PAUSE", 0.05)
    path = tmp_path / "policy.toml"
    path.write_text(entry("acme"), encoding="utf-8")
    with routed(plms[:1], Policy.read(path), path=path) as (url, fleet):
        until(lambda: fleet._number == 0)
        path.write_text(entry("other"), encoding="utf-8")
        before = fleet.ready[0]
        before.process.kill()
        until(lambda: fleet.ready and fleet.ready[0] is not before)
        time.sleep(0.5)  # longer than the reread would take
        assert httpx2.get(f"{url}/v1/plm", headers=bearer()).status_code == 200
        fleet.request_reread()
        until(lambda: httpx2.get(f"{url}/v1/plm", headers=bearer()).status_code == 401)
        assert httpx2.get(f"{url}/v1/plm", headers=bearer("other")).status_code == 200


async def broken(_request):
    raise httpx2.ReadError("the worker was killed")


def test_a_worker_that_ends_is_replaced_and_its_sessions_are_unknown(plms, monkeypatch):
    monkeypatch.setattr("pema.serving.workers.FIRST_PAUSE", 0.05)
    with routed(plms) as (url, fleet), httpx2.Client(base_url=url, timeout=60) as client:
        first = [opened(client, [[1, 5]])[1] for _ in range(2)]
        lost = fleet.choose(first[0].split("/")[-1])
        monkeypatch.setattr(lost.transport, "handle_async_request", broken)
        answer = client.post(f"{first[0]}/advance", json={"step": 1, "tokens": [7]})
        assert refusal(answer, 503, "worker_lost")["remedy"] == "Send it again."
        lost.process.kill()
        until(lambda: len(fleet.ready) == 2 and lost not in fleet.ready)
        answers = [client.post(f"{path}/advance", json={"step": 1, "tokens": [7]}) for path in first]
        refusal(answers[0], 404, "unknown_session")
        tensors(answers[1])


def test_a_client_that_leaves_takes_its_work_along(plms):
    with routed(plms[:1], Policy(keys=(key(tokens_per_day=100),))) as (url, fleet):
        (worker,) = fleet.ready
        with Blocked(service(worker).batcher):
            body = json.dumps(GOOD).encode()
            head = f"POST /v1/represent HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer {KEYS['acme']}\r\n"
            with socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2])), timeout=10) as connection:
                connection.sendall(
                    f"{head}Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body
                )
                waited(service(worker).batcher, 1)
            waited(service(worker).batcher, 0)
            until(lambda: fleet.in_flight == worker.unanswered == 0)
        assert service(worker).accounts["acme"].quota.remaining()[0].left == 100


def test_a_body_that_arrives_too_slowly(server, monkeypatch):
    monkeypatch.setattr("pema.serving.router.BODY_SECONDS", 0.2)
    url, fleet = server
    head = f"POST /v1/represent HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer {KEYS['acme']}\r\n"
    with socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2])), timeout=30) as connection:
        connection.sendall(f"{head}Content-Type: application/json\r\nContent-Length: 100\r\n\r\n{{".encode())
        assert connection.recv(100).startswith(b"HTTP/1.1 408 ")
    until(lambda: fleet.in_flight == 0 and all(worker.unanswered == 0 for worker in fleet.ready))


def test_a_router_that_is_about_to_stop(plms):
    with routed(plms[:1]) as (url, fleet):
        fleet.draining = True
        with httpx2.Client(base_url=url, timeout=60) as client:
            refusal(client.get("/readyz"), 503, "draining")
            refusal(client.post("/v1/represent", json=GOOD), 503, "draining")
            assert client.get("/healthz").status_code == 200


def test_without_a_ready_worker(plms, monkeypatch):
    go, plain = threading.Event(), Policy.read
    monkeypatch.setattr(Policy, "read", lambda path: go.wait(60) and plain(path))
    with contextlib.ExitStack() as stack:
        stack.callback(go.set)
        url, fleet = stack.enter_context(routed(plms, path="/nowhere", ready=0))
        with httpx2.Client(base_url=url, timeout=60) as client:
            for path in ("/readyz", "/v1/plm", "/metrics"):
                refusal(client.get(path), 503, "loading")
            assert client.get("/healthz").status_code == 200
            for place in fleet._places:
                place.pause = 30.0
            refusal(client.get("/healthz"), 503, "broken")


def test_only_programs_of_this_machine(plms):
    with routed(plms[:1], local_only=True) as (url, _), httpx2.Client(base_url=url, timeout=60) as client:
        assert client.get("/v1/plm").status_code == 200
        refusal(client.get("/v1/plm", headers={"Host": "evil.example"}), 403, "wrong_host")


def test_the_same_answer_from_the_other_plm_is_refused(server, client):
    about = client.get("/v1/plm", headers={"Pema-PLM": "0" * 64})
    error = refusal(about, 412, "another_plm")
    assert "another PLM" in error["message"]
