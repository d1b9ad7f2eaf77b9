"""Hostile connections: silent ones, slow ones, and unexpected data."""

import contextlib
import json
import logging
import socket
import threading
import time

import httpx2
import pytest
from served import bearer, key, listening, refusal, served

from pema.serving import connections as module
from pema.serving import gate
from pema.serving.connections import Connections, host_of, is_loopback
from pema.serving.logs import JSONLines, RateFilter
from pema.serving.policy import Limits, Policy
from pema.serving.server import Address

GOOD = {"sequences": [[1, 2, 3]], "starts": [1]}


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


@pytest.fixture
def pairs():
    """Makes connections that know whether they were shut."""
    with contextlib.ExitStack() as stack:

        def make():
            ours, theirs = socket.socketpair()
            stack.callback(ours.close)
            stack.callback(theirs.close)
            theirs.settimeout(0.0)
            return ours, theirs

        yield make


def shut(theirs):
    try:
        return theirs.recv(1) == b""
    except BlockingIOError:
        return False


def test_one_connection_more_closes_the_one_that_is_silent_for_longest(pairs):
    clock = Clock()
    live, ends = Connections(3, clock), {}
    for port in range(3):
        ours, ends[port] = pairs()
        assert live.add(("a", port), ours)
        clock.now += 1
    live.begin(("a", 0))
    live.end(("a", 0))
    ours, ends[3] = pairs()
    assert live.add(("a", 3), ours)
    assert [shut(ends[port]) for port in range(4)] == [False, True, False, False]
    live.forget(("a", 1))
    for port in (0, 2, 3):
        live.begin(("a", port))
    ours, _ = pairs()
    assert not live.add(("a", 4), ours)  # all of them are being answered
    assert len(live) == 3


def test_the_silent_are_closed_and_the_busy_are_not(pairs, monkeypatch):
    clock = Clock()
    live = Connections(9, clock)
    ends = []
    for port in range(3):
        ours, theirs = pairs()
        live.add(("a", port), ours)
        ends.append(theirs)
    live.begin(("a", 0))
    clock.now += module.IDLE_SECONDS - 1
    live.begin(("a", 1))
    live.end(("a", 1))
    live.sweep()
    assert not any(map(shut, ends))
    clock.now += 2
    live.sweep()
    assert [shut(end) for end in ends] == [False, False, True]
    live.end(("a", 0))
    live.drop(("a", 0))
    live.drop(("b", 7))
    live.end(None)
    assert shut(ends[0])


def dial(url):
    host, port = url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=10)


def test_silent_connections_do_not_keep_others_out(plm, caplog):
    """A thousand of them stopped the server while they stayed."""
    with contextlib.ExitStack() as stack, listening(plm, connections=8) as (url, _):
        silent = [stack.enter_context(dial(url)) for _ in range(60)]
        began = time.monotonic()
        for _ in range(3):
            assert httpx2.post(f"{url}/v1/represent", json=GOOD).status_code == 200
        assert time.monotonic() - began < 3
        gone = 0
        for connection in silent:
            connection.settimeout(0.1)
            with contextlib.suppress(TimeoutError):
                with contextlib.suppress(ConnectionError):
                    assert connection.recv(1) == b""
                gone += 1
        assert gone >= 50
    assert not [record for record in caplog.records if record.name in ("asyncio", "uvicorn.error")]


def test_headers_that_drip_are_cut_off(plm, monkeypatch):
    monkeypatch.setattr(module, "IDLE_SECONDS", 0.3)
    with listening(plm) as (url, _), dial(url) as connection:
        began = time.monotonic()
        with contextlib.suppress(ConnectionError):
            connection.sendall(b"GET /v1/plm HTTP/1.1\r\nHost: a\r\n")
            for _ in range(100):
                connection.sendall(b"X: y\r\n")
                time.sleep(0.1)
        assert time.monotonic() - began < 5


@pytest.mark.parametrize(
    ("headers", "status"), [("Content-Type: application/json\r\n", 413), ("Authorization: Bearer wrong\r\n", 401)]
)
def test_an_endless_body_is_not_read_on_behind_its_answer(plm, headers, status):
    policy = Policy(limits=Limits(body_bytes=2000), keys=(key(),) if status == 401 else ())
    with listening(plm, policy) as (url, _), dial(url) as connection:
        start = f"POST /v1/represent HTTP/1.1\r\nHost: a\r\n{headers}Transfer-Encoding: chunked\r\n\r\n".encode()
        connection.sendall(start)
        sent, answer = 0, b""

        def read():
            nonlocal answer
            with contextlib.suppress(OSError):
                while piece := connection.recv(1 << 16):
                    answer += piece

        reader = threading.Thread(target=read)
        reader.start()
        began = time.monotonic()
        with contextlib.suppress(OSError):
            while time.monotonic() - began < 20:
                connection.sendall(b"10000\r\n" + b" " * 65536 + b"\r\n")
                sent += 65536
        reader.join(10)
        assert time.monotonic() - began < 5
        assert answer.startswith(f"HTTP/1.1 {status} ".encode())
        assert b"connection: close" in answer.lower()


def test_a_refused_body_that_ends_soon_keeps_its_connection(plm):
    """Who is wrong about the key is told so, also behind a body that has not been read."""
    with listening(plm, Policy(keys=(key(),))) as (url, _), httpx2.Client(base_url=url) as client:
        for _ in range(3):
            body = {"sequences": [[1] * 100_000], "starts": [1]}
            refusal(client.post("/v1/represent", json=body), 401, "unknown_key")


LARGE = {"sequences": [[1] * 128] * 128, "starts": [1] * 128, "dtype": "float32"}  # 2 MB of answer


def ask(url, body):
    """A request whose answer nobody reads."""
    host, port = url.removeprefix("http://").split(":")
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.settimeout(20)
    connection.connect((host, int(port)))
    content = json.dumps(body).encode()
    lines = [
        "POST /v1/represent HTTP/1.1",
        "Host: a",
        "Content-Type: application/json",
        f"Content-Length: {len(content)}",
    ]
    connection.sendall("\r\n".join([*lines, "", ""]).encode() + content)
    return connection


def test_answers_that_nobody_reads_are_bounded_and_given_up(plm, monkeypatch):
    monkeypatch.setattr(gate, "WRITE_SECONDS", 1.0)
    with contextlib.ExitStack() as stack, listening(plm, buffer=16384, pending_bytes=5 << 20) as (url, app):
        service = app.state.lifecycle.service()
        pending = service.accounts["anybody"].pending
        for count in (1, 2):
            stack.enter_context(ask(url, LARGE))
            deadline = time.monotonic() + 10
            while pending.held < count * 128 * 127 * 4 * plm.description.d_tap:
                assert time.monotonic() < deadline
                time.sleep(0.01)
        refusal(httpx2.post(f"{url}/v1/represent", json=LARGE), 429, "answers_unread")
        assert httpx2.post(f"{url}/v1/represent", json=GOOD).status_code == 200  # others and smaller ones go on
        deadline = time.monotonic() + 15
        while pending.held:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert httpx2.post(f"{url}/v1/represent", json=LARGE, timeout=20).status_code == 200
        while app.state.lifecycle.in_flight:  # The client has its answer a moment before the server is done with it.
            assert time.monotonic() < deadline
            time.sleep(0.01)


def test_an_answer_that_is_read_slowly_arrives_whole(plm, monkeypatch):
    monkeypatch.setattr(gate, "PIECE", 4096)
    with listening(plm, buffer=16384) as (url, _), ask(url, LARGE) as connection:
        received, began = b"", time.monotonic()
        while piece := connection.recv(1 << 16):
            received += piece
            if len(received) < 100_000:
                time.sleep(0.01)
            head, _, body = received.partition(b"\r\n\r\n")
            length = next(int(line.split(b":")[1]) for line in head.lower().split(b"\r\n") if b"content-length" in line)
            if len(body) == length:
                break
        assert len(body) == length > 128 * 127 * 4 * plm.description.d_tap
        assert time.monotonic() - began < 20


@pytest.mark.parametrize(
    ("headers", "served_there"),
    [
        ({"Host": "127.0.0.1:8000"}, True),
        ({"Host": "localhost"}, True),
        ({"Host": "LOCALHOST:1"}, True),
        ({"Host": "[::1]:8000"}, True),
        ({"Host": "127.1.2.3"}, True),
        ({"Host": "127.0.0.1", "Sec-Fetch-Site": "same-origin"}, True),
        ({"Host": "127.0.0.1", "Sec-Fetch-Site": "none"}, True),
        ({"Host": "evil.example"}, False),
        ({"Host": "localhost.evil.example:8000"}, False),
        ({"Host": "127.0.0.1.evil.example"}, False),
        ({"Host": "10.0.0.1:8000"}, False),
        ({"Host": ""}, False),
        ({"Host": "[::1"}, True),
        ({"Host": "127.0.0.1", "Sec-Fetch-Site": "cross-site"}, False),
        ({"Host": "localhost", "Sec-Fetch-Site": "same-site"}, False),
    ],
)
def test_a_server_without_keys_answers_to_its_own_name_only(plm, headers, served_there):
    """A page whose name was bound to 127.0.0.1 anew could read the head and every answer."""
    with served(plm, local_only=True) as client:
        for path in ("/v1/plm", "/v1/head", "/healthz", "/docs", "/openapi.json"):
            answer = client.get(path, headers=headers)
            if served_there:
                assert answer.status_code == 200
            else:
                refusal(answer, 403, "wrong_host")


def test_who_is_asked_by_name():
    assert Address("127.0.0.1").local_only(Policy())
    assert not Address("127.0.0.1").local_only(Policy(keys=(key(),)))
    assert not Address("0.0.0.0").local_only(Policy())
    assert [host_of(h) for h in ("a:1", "a", "[::1]:2", "::1", "")] == ["a", "a", "::1", "::1", ""]
    assert [is_loopback(h) for h in ("127.0.0.1", "::1", "localhost", "a", "")] == [True, True, True, False, False]


def test_the_page_of_documentation_loads_and_runs_nothing(plm):
    with served(plm, Policy(keys=(key(),))) as client:
        answer = client.get("/docs")
        assert answer.status_code == 200
        text = answer.text.lower()
        assert not any(part in text for part in ("<script", "src=", "http://", "https://", "<input", "<form", "<link"))
        assert "default-src 'none'" in answer.headers["content-security-policy"]
        paths = client.get("/openapi.json").json()["paths"]
        assert all(path in answer.text for path in paths)
        assert client.get("/redoc").status_code == 404
        assert client.get("/v1/plm", headers=bearer()).status_code == 200


def test_what_a_library_says_again_and_again_is_written_once_in_a_while():
    seldom = RateFilter(10.0)

    def record(name, line, created, message="x"):
        made = logging.LogRecord(name, logging.WARNING, "file.py", line, message, (), None)
        made.created = created
        return made

    said = [seldom.filter(record("asyncio", 1, at, str(at))) for at in (100.0, 101.0, 109.9, 110.1, 111.0)]
    assert said == [True, False, False, True, False]
    assert seldom.filter(record("asyncio", 2, 111.0))
    assert all(seldom.filter(record("pema.serving.requests", 1, 111.0)) for _ in range(3))
    assert json.loads(JSONLines().format(record("asyncio", 1, 1.0, "socket.accept() out of system resource")))
