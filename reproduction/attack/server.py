"""Attacks on `pema serve`, each over the loopback, bounded in time and in size, against a separate process."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import resource
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2

MIB = 1 << 20
PATIENCE = 60.0
KEYS = {name: f"pema_attack-key-of-{name}" for name in ("greedy", "quiet")}
GOOD = {"sequences": [[1, 20, 21]], "starts": [1]}
JSON = {"Content-Type": "application/json"}
KEYED = "".join(
    f'[[keys]]\nname = "{name}"\nsha256 = "{hashlib.sha256(key.encode()).hexdigest()}"\n' for name, key in KEYS.items()
)
LARGE: dict[str, Any] = {"sequences": [[1] * 500] * 32, "starts": [1] * 32, "dtype": "float32"}

Held = dict[str, Any]
"""Result of an attack: the numbers of attempts that `held` and `fell`, and `figures`, a text of measurements."""


class Server:
    """A running server.

    Attributes:
        url: its address.
        process: the process.
    """

    def __init__(self, url: str, process: subprocess.Popen[str], folder: Path) -> None:
        self.url, self.process, self._folder, self._log = url, process, folder, folder / "log"

    def client(self, key: str | None = None) -> httpx2.Client:
        """Return a client with a key."""
        headers = {} if key is None else {"Authorization": f"Bearer {KEYS[key]}"}
        limits = httpx2.Limits(max_connections=400)
        return httpx2.Client(base_url=self.url, headers=headers, timeout=PATIENCE, limits=limits)

    def dial(self, receive: int | None = None) -> socket.socket:
        """Open a raw connection; `receive` bounds the system's buffer of an answer."""
        connection = socket.socket()
        if receive is not None:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive)
        connection.settimeout(10)
        host, port = self.url.removeprefix("http://").split(":")
        connection.connect((host, int(port)))
        return connection

    def resident(self) -> int:
        """Return the resident bytes of the process."""
        pages = Path(f"/proc/{self.process.pid}/statm").read_text(encoding="ascii").split()[1]
        return int(pages) * os.sysconf("SC_PAGE_SIZE")

    def lines(self) -> list[str]:
        """Return the lines of its log."""
        return self._log.read_text(encoding="utf-8").splitlines()

    def workers(self) -> list[Worker]:
        """Return its workers that run, in the order in which they were started."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text(encoding="ascii")
        lines = [(int(child), Path(f"/proc/{child}/cmdline").read_text(encoding="utf-8")) for child in children.split()]
        return [Worker(child, json.loads(line.split("\0")[-2])["socket"]) for child, line in sorted(lines)]

    def reread(self, policy: str) -> None:
        """Change the policy and have it reread."""
        (self._folder / "policy.toml").write_text(policy, encoding="utf-8")
        self.process.send_signal(signal.SIGHUP)

    def foreign_lines(self) -> int:
        """Return the number of lines of the log that are not JSON."""
        return sum(not _is_json(line) for line in self.lines())


@dataclass(frozen=True)
class Worker:
    """A process of a server with several.

    Attributes:
        number: of the process.
        socket: path of the socket at which it listens.
    """

    number: int
    socket: str

    def kill(self) -> None:
        """Kill it."""
        os.kill(self.number, signal.SIGKILL)


@contextlib.contextmanager
def serving(code: Path, policy: str = "", *options: str, folder: Path | None = None) -> Iterator[Server]:
    """Run the server of a checkout; yield it when it is ready.

    Args:
        code: the checkout.
        policy: content of the policy file.
        options: further options of `pema serve`.
        folder: working folder, which is kept.
    """
    with tempfile.TemporaryDirectory(prefix="pema-attack-") as name:
        folder = folder or Path(name)
        (folder / "policy.toml").write_text(policy, encoding="utf-8")
        command = [sys.executable, "-m", "pema", "serve", "embedded", "--port", "0", *options]
        environment = os.environ | {"PYTHONPATH": str(code / "src"), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        with (folder / "log").open("w", encoding="utf-8") as log:
            process = subprocess.Popen(
                [*command, "--policy", str(folder / "policy.toml")],
                env=environment, stdout=subprocess.PIPE, stderr=log, text=True, cwd=folder, preexec_fn=_usual_files,
            )  # fmt: skip
        assert process.stdout is not None
        try:
            line = process.stdout.readline()
            if not line.startswith("serving "):
                raise SystemExit(f"no server comes up: {(folder / 'log').read_text(encoding='utf-8')}")
            server = Server(line.split()[-1], process, folder)
            with server.client() as client:
                deadline = time.monotonic() + 2 * PATIENCE
                while client.get("/readyz").status_code != 200:
                    if time.monotonic() > deadline:
                        raise SystemExit("the server does not become ready")
                    time.sleep(0.1)
                client.post("/v1/represent", json=GOOD)  # The first use tries optimisations.
            yield server
        finally:
            process.kill()
            process.wait(PATIENCE)
            process.stdout.close()


class HealthWatch:
    """Thread that requests the health endpoint repeatedly, and records the longest wait and the peak memory."""

    def __init__(self, server: Server) -> None:
        self._server, self._over = server, threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self.wait, self.peak = 0.0, 0
        self.before = server.resident()

    def __enter__(self) -> HealthWatch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    @property
    def grown(self) -> int:
        """Peak memory above that at the start, in MiB."""
        return max(0, self.peak - self.before) // MIB

    def _watch(self) -> None:
        sampling = threading.Thread(target=self._sample)
        sampling.start()
        with self._server.client() as client:
            while not self._over.is_set():
                began = time.monotonic()
                with contextlib.suppress(httpx2.HTTPError):
                    client.get("/healthz")
                self.wait = max(self.wait, time.monotonic() - began)
                self._over.wait(0.01)
        sampling.join()

    def _sample(self) -> None:
        while not self._over.is_set():
            self.peak = max(self.peak, self._server.resident())
            self._over.wait(0.01)


def _filled(before: bytes, piece: bytes, after: bytes) -> bytes:
    return before + piece * ((MIB - len(before) - len(after)) // len(piece) - 1) + after


BODIES = {
    "texts for tokens": _filled(b'{"sequences": [[', b'"",', b'""]], "starts": [1]}'),
    "texts for sequences": _filled(b'{"sequences": [', b'"",', b'""], "starts": [1]}'),
    "objects for sequences": _filled(b'{"sequences": [', b"{},", b'{}], "starts": [1]}'),
    "negative tokens": _filled(b'{"sequences": [[', b"-1,", b'1]], "starts": [1]}'),
    "sequences of one token": _filled(b'{"sequences": [', b"[1],", b'[1]], "starts": [1]}'),
    "half a million starts": _filled(b'{"sequences": [[1, 2]], "starts": [', b"1,", b"1]}"),
    "fields without end": _filled(b"{", b'"a":1,', b'"b":1}'),
    "nested lists": b"[" * MIB,
    "not UTF-8": b"\xff" * MIB,
}


def malformed_bodies(code: Path) -> Held:
    """Send malformed bodies of 1 MiB while another client requests the health endpoint."""
    held, worst, slowest = 0, "", 0.0
    with serving(code) as server, server.client() as client, HealthWatch(server) as watched:
        for name, body in BODIES.items():
            before, watched.wait = watched.wait, 0.0
            began = time.monotonic()
            answer = client.post("/v1/represent", content=body, headers=JSON)
            seconds = time.monotonic() - began
            held += 400 <= answer.status_code < 500 and seconds < 0.5
            if seconds > slowest:
                worst, slowest = name, seconds
            watched.wait = max(before, watched.wait)
    figures = f"{slowest:.2f} s for one ({worst}), others waited {watched.wait:.2f} s, +{watched.grown} MiB"
    return {"held": held, "fell": len(BODIES) - held, "figures": figures}


def padded_steps(code: Path) -> Held:
    """Step one session of 500 tokens and many of 2 at once; expand one row to 256."""
    with serving(code) as server, server.client() as client:
        sessions = [opened(client, [[1] * 500])]
        sessions += [opened(client, [[1, 2]] * 256) for _ in range(7)]
        with HealthWatch(server) as watched, ThreadPoolExecutor(9) as pool:
            blocking = pool.submit(client.post, "/v1/represent", json=LARGE)
            time.sleep(0.1)
            rows = [1, *[256] * 7]
            steps = [
                pool.submit(client.post, f"{path}/advance", json={"step": 1, "tokens": [5] * count})
                for path, count in zip(sessions, rows, strict=True)
            ]
            statuses = [step.result().status_code for step in steps]
            blocking.result()
        joined = watched.grown
    with serving(code, "[limits]\nsession_bytes = 20_000_000\n") as server, server.client() as client:
        path = opened(client, [[1] * 500])
        with HealthWatch(server) as watched:
            grown = client.post(f"{path}/advance", json={"step": 1, "tokens": [5] * 256, "parents": [0] * 256})
            after = client.post(f"{path}/advance", json={"step": 1, "tokens": [5]})
        refused = grown.status_code == 413 and after.status_code == 200
    held = (joined < 1000 and statuses == [200] * 8) + (watched.grown < 100 and refused)
    what = f"one pass takes +{joined} MiB; 1 row to 256: +{watched.grown} MiB, answered {grown.status_code}"
    return {"held": held, "fell": 2 - held, "figures": what}


def crowding_out(code: Path) -> Held:
    """Open sessions with one key until those of another key are gone."""
    policy = KEYED + "[limits]\nsession_bytes = 20_000_000\nsessions = 100\n"
    with serving(code, policy) as server, server.client("quiet") as quiet, server.client("greedy") as greedy:
        paths = [opened(quiet, [[1] * 100]) for _ in range(10)]
        for _ in range(60):
            greedy.post("/v1/sessions", json={"prompts": [[1] * 100]})
        steps = [quiet.post(f"{path}/advance", json={"step": 1, "tokens": [5]}) for path in paths]
        alive = sum(step.status_code == 200 for step in steps)
    return {"held": alive, "fell": 10 - alive, "figures": f"{alive} of 10 sessions of another key go on"}


def silent_connections(code: Path) -> Held:
    """Open silent connections, then send some requests of an honest client."""
    _allow_files(4096)
    served, waits = 0, []
    with contextlib.ExitStack() as stack, serving(code) as server:
        for _ in range(1500):
            with contextlib.suppress(OSError):
                stack.enter_context(server.dial())
        lines = len(server.lines())
        for _ in range(5):
            began = time.monotonic()
            with contextlib.suppress(httpx2.HTTPError):
                served += httpx2.post(f"{server.url}/v1/represent", json=GOOD, timeout=5).status_code == 200
            waits.append(time.monotonic() - began)
        foreign, logged = server.foreign_lines(), len(server.lines()) - lines
    figures = (
        f"{served} of 5 requests answered, the longest after {max(waits):.2f} s; {logged} lines, {foreign} no JSON"
    )
    return {"held": served + (foreign == 0), "fell": 5 - served + (foreign > 0), "figures": figures}


def endless_bodies(code: Path) -> Held:
    """Send endless bodies after a 401 and a 413."""
    taken = []
    with serving(code, KEYED) as server:
        for key in ("wrong", KEYS["quiet"]):
            with server.dial() as connection:
                head = (
                    f"POST /v1/represent HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer {key}\r\n"
                    "Content-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
                )
                connection.sendall(head.encode())
                sent, end = 0, time.monotonic() + 5
                with contextlib.suppress(OSError):
                    while time.monotonic() < end:
                        connection.sendall(b"10000\r\n" + b" " * 65536 + b"\r\n")
                        sent += 65536
                taken.append(sent)
    held = sum(sent < 32 * MIB for sent in taken)
    return {"held": held, "fell": 2 - held, "figures": f"{max(taken) // MIB} MiB taken in 5 s"}


def unread_answers(code: Path) -> Held:
    """Request thirty answers of 20 MB without reading them; measure how much is kept, and for how long."""
    with serving(code) as server:
        with server.client() as client:
            client.post("/v1/represent", json=LARGE)  # The memory of the PLM itself is not a fault.
        with contextlib.ExitStack() as stack, HealthWatch(server) as watched:
            for _ in range(30):
                connection = stack.enter_context(server.dial(4096))
                connection.sendall(_request(LARGE))
            began, kept = time.monotonic(), 0
            time.sleep(30)
            while (seconds := time.monotonic() - began) < 80:
                time.sleep(1)
                kept = max(0, server.resident() - watched.before) // MIB
                if kept < 100:
                    break
    held = kept < 100 and watched.grown < 400
    figures = f"at most +{watched.grown} MiB, +{kept} MiB after {seconds:.0f} s"
    return {"held": int(held), "fell": int(not held), "figures": figures}


def abandoned_work(code: Path) -> Held:
    """Send requests and leave at once, others to a full queue; measure the charged tokens."""
    policy = KEYED.replace('name = "greedy"\n', 'name = "greedy"\nendpoints = ["represent", "metrics"]\n')
    with serving(code, policy + "[limits]\nqueue_requests = 4\n") as server, server.client("greedy") as client:
        with ThreadPoolExecutor(40) as pool:
            first = pool.submit(client.post, "/v1/represent", json=LARGE)
            time.sleep(0.1)
            for _ in range(3):
                with server.dial() as connection:
                    connection.sendall(_request(LARGE, KEYS["greedy"]))
                    time.sleep(0.05)
            more = [pool.submit(client.post, "/v1/represent", json=LARGE) for _ in range(39)]
            statuses = [answer.result().status_code for answer in (first, *more)]
        lines = client.get("/metrics").text.splitlines()
    (charged,) = (
        float(line.split()[1]) for line in lines if line.startswith('pema_tokens_total{endpoint="represent"}')
    )
    answered, each = statuses.count(200), sum(map(len, LARGE["sequences"]))
    figures = f"{answered} answers of {each:,} tokens, {statuses.count(503)} turned away: {charged:,.0f} tokens charged"
    fair = charged <= answered * each
    return {"held": int(fair), "fell": int(not fair), "figures": figures}


def garbage(code: Path) -> Held:
    """Send bytes that are not HTTP."""
    dice, held = random.Random(0), 0
    with serving(code) as server, server.client() as client:
        for i in range(200):
            with contextlib.suppress(OSError), server.dial() as connection:
                content = dice.randbytes(dice.randint(1, 3000))
                connection.sendall(content if i % 2 else b"POST /v1/represent HTTP/1.1\r\n" + content)
            held += client.get("/healthz").status_code == 200
        foreign = server.foreign_lines()
    return {"held": held, "fell": 200 - held, "figures": f"{foreign} lines of the log are no JSON"}


def rebinding(code: Path) -> Held:
    """Send requests of a web page by DNS rebinding; check what the documentation page loads."""
    with serving(code) as server, server.client() as client:
        host = {"Host": "evil.example:8000"}
        let_in = [path for path in ("/v1/plm", "/v1/head") if client.get(path, headers=host).is_success]
        loads = "<script" in client.get("/docs").text
    what = f"{len(let_in)} of 2 endpoints answer; /docs {'loads' if loads else 'has no'} scripts"
    return {"held": 3 - len(let_in) - loads, "fell": len(let_in) + loads, "figures": what}


def signals(code: Path) -> Held:
    """Send a second SIGTERM during a request."""
    with serving(code, "[batching]\nwindow_ms = 8000\n") as server, ThreadPoolExecutor(1) as pool:
        pool.submit(lambda: httpx2.post(f"{server.url}/v1/represent", json=GOOD, timeout=PATIENCE))
        time.sleep(0.7)
        server.process.send_signal(signal.SIGTERM)
        time.sleep(0.5)
        server.process.send_signal(signal.SIGTERM)
        code_ = server.process.wait(PATIENCE)
        held = code_ == 128 + signal.SIGTERM and server.foreign_lines() == 0
        figures = f"ended with {code_}, {server.foreign_lines()} lines of the log are no JSON"
    return {"held": int(held), "fell": int(not held), "figures": figures}


ATTACKS: dict[str, Callable[[Path], Held]] = {
    "Malformed bodies of 1 MiB": malformed_bodies,
    "Sessions padded to the longest, and a step that grows 1 row to 256": padded_steps,
    "Sessions that crowd out another key's": crowding_out,
    "1,500 silent connections": silent_connections,
    "Endless bodies behind a 401 and a 413": endless_bodies,
    "30 answers that nobody reads": unread_answers,
    "Charges for what was turned away or abandoned": abandoned_work,
    "200 messages that are no HTTP": garbage,
    "DNS rebinding, and scripts from elsewhere": rebinding,
    "A second SIGTERM": signals,
}


def opened(client: httpx2.Client, prompts: list[list[int]]) -> str:
    """Open a session and return its path."""
    answer = client.post("/v1/sessions", json={"prompts": prompts})
    if answer.status_code != 201:
        raise SystemExit(f"a session cannot be opened: {answer.text}")
    (size,) = struct.unpack_from("<Q", answer.content)
    return f"/v1/sessions/{json.loads(answer.content[8 : 8 + size])['__metadata__']['session']}"


def _request(body: dict[str, Any], key: str = "none") -> bytes:
    content = json.dumps(body).encode()
    lines = [
        "POST /v1/represent HTTP/1.1",
        "Host: 127.0.0.1",
        f"Authorization: Bearer {key}",
        "Content-Type: application/json",
        f"Content-Length: {len(content)}",
    ]
    return "\r\n".join([*lines, "", ""]).encode() + content


def _is_json(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:
        return False


def _allow_files(count: int) -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(count, hard), hard))


def _usual_files() -> None:
    """Set the usual limit of open files, independent of the attacker's limit."""
    _allow_files(1024)
