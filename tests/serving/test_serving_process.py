"""`pema serve` as a process of its own: TLS, refusals over a real connection, a soak, and a clean end."""

import contextlib
import json
import signal
import socket
import ssl
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import httpx2
import pytest
from served import KEYS, bearer, refusal, tensors

from pema.serving.keys import digest

PATIENCE = 120
PEMA = [sys.executable, "-m", "pema"]
GOOD = {"sequences": [[1, 2, 3]], "starts": [1]}


@contextlib.contextmanager
def serving(folder, policy, *options):
    """A running server: the process, its address, and where its log goes."""
    path, log = folder / f"{time.monotonic_ns()}.toml", folder / f"{time.monotonic_ns()}.log"
    path.write_text(policy, encoding="utf-8")
    command = [*PEMA, "serve", str(folder / "plm"), "--port", "0", "--policy", str(path)]
    with log.open("w", encoding="utf-8") as errors:
        process = subprocess.Popen([*command, *map(str, options)], stdout=subprocess.PIPE, stderr=errors, text=True)
    try:
        line = process.stdout.readline()
        assert line.startswith("serving "), log.read_text(encoding="utf-8")
        yield process, line.split()[-1], log
    finally:
        process.kill()
        process.wait(PATIENCE)
        process.stdout.close()


def ready(client):
    deadline = time.monotonic() + PATIENCE
    while client.get("/readyz").status_code != 200:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    return client


@pytest.fixture(scope="module")
def server(folder, certificate):
    """A server with TLS, two keys and small limits, and how to reach it."""
    policy = f"""
    [limits]
    body_bytes = 20000
    session_idle_seconds = 1
    [[keys]]
    name = "acme"
    sha256 = "{digest(KEYS["acme"])}"
    endpoints = ["plm", "tokenizer", "head", "represent", "predict", "sessions", "metrics"]
    """
    cert, private = certificate
    with serving(folder, policy, "--tls-cert", cert, "--tls-key", private) as (process, url, log):
        yield process, url, log, ssl.create_default_context(cafile=str(cert))


@pytest.fixture
def https(server):
    _, url, _, trust = server
    with httpx2.Client(base_url=url, verify=trust, headers=bearer(), timeout=PATIENCE) as client:
        yield ready(client)


def test_over_tls_only(server, https):
    _, url, _, _ = server
    assert url.startswith("https://127.0.0.1:")
    assert https.get("/v1/plm").json()["description"]["name"] == "plm"
    found, _ = tensors(https.post("/v1/represent", json=GOOD))
    assert found["counts"].tolist() == [2]
    with pytest.raises(httpx2.TransportError):
        httpx2.get(url.replace("https", "http") + "/healthz")
    with pytest.raises(httpx2.TransportError, match="certificate"):
        httpx2.get(url + "/healthz")


def test_what_is_wrong_is_a_clear_4xx(https):
    refusal(https.post("/v1/represent", json=GOOD, headers={"Authorization": "Bearer wrong"}), 401, "unknown_key")
    large = {"sequences": [[1] * 50_000], "starts": [1]}
    refusal(https.post("/v1/represent", json=large), 413, "body_too_large")
    huge = (b" " * 100_000 for _ in range(50))
    refusal(
        https.post("/v1/represent", content=huge, headers={"Content-Type": "application/json"}), 413, "body_too_large"
    )
    json_type = {"Content-Type": "application/json"}
    refusal(https.post("/v1/represent", content=b'{"sequences": [[1,', headers=json_type), 422, "invalid_json")
    binary = {"Content-Type": "application/vnd.safetensors"}
    refusal(https.post("/v1/represent", content=b"\0" * 100, headers=binary), 415, "not_json")
    answer = https.post("/v1/represent", json={"sequences": [[1, 2, 320]], "starts": [1]})
    assert "token 320" in refusal(answer, 422, "unknown_token")["message"]
    _, texts = tensors(https.post("/v1/sessions", json={"prompts": [[1, 2]]}), 201)
    time.sleep(2.2)
    answer = https.post(f"/v1/sessions/{texts['session']}/advance", json={"step": 1, "tokens": [3]})
    refusal(answer, 410, "session_expired")


def figures(client):
    """What the server says of itself."""
    lines = [line.split() for line in client.get("/metrics").text.splitlines() if not line.startswith("#")]
    return {name: float(value) for name, value in lines}


def use(url, trust, end, seed):
    """What one client does until `end`; among it much that is wrong, and sessions that it never closes."""
    answered = 0
    with httpx2.Client(base_url=url, verify=trust, headers=bearer(), timeout=PATIENCE) as client:
        while time.monotonic() < end:
            n = seed + answered
            prompt = [1, *range(3, 5 + n % 9)]
            answers = [client.post("/v1/represent", json={"sequences": [prompt], "starts": [1]})]
            answers += [client.post("/v1/predict", json={"prompts": [prompt], "steps": [8 + n % 2]})]
            opened = client.post("/v1/sessions", json={"prompts": [prompt, [1, 2]]})
            if opened.status_code == 201:
                path = f"/v1/sessions/{tensors(opened, 201)[1]['session']}"
                answers += [client.post(f"{path}/advance", json={"step": 1, "tokens": [n % 300, 4]})]
                if n % 3:
                    answers += [client.delete(path)]
            answers += [client.post("/v1/represent", content=b" " * 30_000 * (n % 2))]
            assert {answer.status_code for answer in [*answers, opened]} <= {200, 201, 204, 410, 413, 415, 422, 429}
            answered += len(answers) + 1
    return answered


def test_a_soak_leaves_nothing_behind(server, https):
    _, url, _, trust = server
    use(url, trust, time.monotonic() + 0.5, 0)
    before = figures(https)
    with ThreadPoolExecutor(12) as pool:
        end = time.monotonic() + 6
        answered = sum(pool.map(lambda seed: use(url, trust, end, seed), range(12)))
    assert answered > 100
    deadline = time.monotonic() + 20
    while True:
        after = figures(https)
        left = (after["pema_sessions"], after["pema_session_bytes"], after["pema_queue_requests"])
        if left == (0, 0, 0) and after["process_open_fds"] <= before["process_open_fds"]:
            break
        assert time.monotonic() < deadline, (left, before["process_open_fds"], after["process_open_fds"])
        time.sleep(0.2)
    assert after["process_resident_memory_bytes"] - before["process_resident_memory_bytes"] < 100 << 20
    assert not [name for name in after if 'status="5' in name and "readyz" not in name]


def test_the_log_is_json_and_holds_nothing_that_was_sent(server, https):
    _, _, log, _ = server
    https.post("/v1/represent", json={"sequences": [[311, 313, 317]], "starts": [1]})
    time.sleep(0.2)
    text = log.read_text(encoding="utf-8")
    lines = [json.loads(line) for line in text.splitlines()]
    assert any(line.get("endpoint") == "represent" and line.get("key") == "acme" for line in lines)
    assert not {"prompts", "sequence", "target", "body"} & {name for line in lines for name in line}
    assert KEYS["acme"] not in text


def test_a_server_that_is_told_to_stop_answers_what_is_in_flight(folder):
    # A request waits two seconds for others to join it: long enough to stop the server meanwhile.
    with serving(folder, "[batching]\nwindow_ms = 2000\n") as (process, url, log):
        with httpx2.Client(base_url=url, timeout=PATIENCE) as client, ThreadPoolExecutor(1) as pool:
            ready(client)
            tensors(client.post("/v1/sessions", json={"prompts": [[1, 2]]}), 201)
            answer = pool.submit(httpx2.post, f"{url}/v1/represent", json=GOOD, timeout=PATIENCE)
            time.sleep(0.7)
            process.send_signal(signal.SIGTERM)
            time.sleep(0.4)
            assert not answer.done()
            refusal(client.get("/readyz"), 503, "draining")
            late = client.post("/v1/represent", json=GOOD)
            refusal(late, 503, "draining")
            assert int(late.headers["Retry-After"]) > 0
            assert client.get("/healthz").status_code == 200
            assert tensors(answer.result(PATIENCE))[0]["counts"].tolist() == [2]
        assert process.wait(PATIENCE) == 0
        assert all(json.loads(line)["level"] == "info" for line in log.read_text(encoding="utf-8").splitlines())


def test_a_second_signal_ends_it_at_once_and_not_by_an_abort(folder):
    # A minute in which a request waits for others: nothing but the signals ends the process before.
    with serving(folder, "[batching]\nwindow_ms = 60000\n") as (process, url, log):
        with httpx2.Client(base_url=url, timeout=PATIENCE) as client, ThreadPoolExecutor(1) as pool:
            ready(client)
            answer = pool.submit(httpx2.post, f"{url}/v1/represent", json=GOOD, timeout=PATIENCE)
            time.sleep(0.7)
            process.send_signal(signal.SIGTERM)
            time.sleep(0.4)
            assert not answer.done()
            began = time.monotonic()
            process.send_signal(signal.SIGTERM)
            assert process.wait(PATIENCE) == 128 + signal.SIGTERM
            assert time.monotonic() - began < 5
            with pytest.raises(httpx2.TransportError):
                answer.result(PATIENCE)
        lines = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
        assert lines[-1]["message"] == "stopped at once, with 1 requests unanswered"


def test_what_is_no_http_leaves_a_log_of_json(folder, certificate):
    cert, private = certificate
    for options in ((), ("--tls-cert", cert, "--tls-key", private)):
        with serving(folder, "", *options) as (process, url, log):
            host, port = url.split("//")[1].split(":")
            for content in (
                b"",
                b"\0" * 99,
                b"GET / HTTP/9\r\n\r\n",
                b"\x16\x03\x01\0\x05hello",
                b"GET \xff HTTP/1.1\r\n\r\n",
            ):
                for _ in range(20):
                    with socket.create_connection((host, int(port)), timeout=10) as connection:
                        connection.sendall(content)
            time.sleep(0.5)
            process.send_signal(signal.SIGTERM)
            process.wait(PATIENCE)
            text = log.read_text(encoding="utf-8")
            assert all(isinstance(json.loads(line), dict) for line in text.splitlines())
            assert len(text.splitlines()) < 20


@pytest.mark.slow
def test_a_server_that_is_told_to_stop_while_it_loads_stops_at_once(folder):
    with serving(folder, "") as (process, _, log):
        process.send_signal(signal.SIGINT)
        assert process.wait(PATIENCE) == 0
        assert not log.read_text(encoding="utf-8")
