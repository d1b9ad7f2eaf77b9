"""Workers as processes: started, watched, started again, ended; and `pema serve --workers` as a whole."""

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx2
import pytest
from fleets import until
from served import KEYS, bearer, key
from test_client_process import POLICY, SOURCES, TASK
from test_serving_process import PATIENCE, PEMA

from pema.adapter.schedule import NoAdapter
from pema.errors import ConfigError, ProcessError
from pema.generation.decoding import generate
from pema.owner.client.connection import Connection
from pema.owner.client.remote import RemotePLM
from pema.owner.local import LocalPLM
from pema.serving import worker, workers
from pema.serving.connections import Connections
from pema.serving.policy import Limits, Policy
from pema.serving.store import Store
from pema.serving.workers import DEVICES, Fleet, Plan, Worker, environments

LONG = 3 * PATIENCE
"""Maximum seconds until several processes have imported torch, one after the other."""

MORE = """
endpoints = ["plm", "tokenizer", "head", "sessions", "metrics"]
tokens_per_day = 100_000
"""

PROGRAM = """
import signal, socketserver, sys
from http.server import BaseHTTPRequestHandler

class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        self.send_response(503 if self.path == "/healthz" and "broken" in sys.argv else 200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def address_string(self):
        return ""

    def log_message(self, *_):
        pass

if "fails" in sys.argv:
    sys.exit(3)
if "stubborn" in sys.argv:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
socketserver.ThreadingUnixStreamServer(sys.argv[1], Handler).serve_forever()
"""


class Programs:
    """A plan whose workers are small programs: `kinds[i]` is what the i-th process that is started does."""

    store = policy = None

    def __init__(self, folder, count, *kinds):
        self.environments, self.folder, self.kinds, self.started = [{}] * count, folder, kinds, []

    def start(self, index, rules, number):
        number = len(self.started)
        kind = self.kinds[number] if number < len(self.kinds) else "good"
        path = self.folder / f"{number}.sock"
        process = subprocess.Popen([sys.executable, "-S", "-c", PROGRAM, str(path), kind])
        self.started.append((index, time.monotonic()))
        return Worker(index, str(number), process, httpx2.AsyncHTTPTransport(uds=str(path)))


def fleet_of(plan, store=None):
    return Fleet(plan, store or Store(), Policy(), Connections(1))


@pytest.fixture
def short(monkeypatch, tmp_path):
    """Short pauses, and a folder whose path is short enough for sockets."""
    monkeypatch.setattr(workers, "FIRST_PAUSE", 0.05)
    monkeypatch.setattr(workers, "END_SECONDS", 0.5)
    return tmp_path


def watched(fleet, condition):
    """Run a fleet until a condition holds; then close it."""

    async def run():
        task = asyncio.create_task(fleet.run())
        try:
            async with asyncio.timeout(60):
                while not condition():
                    await asyncio.sleep(0.01)
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            await fleet.close()

    asyncio.run(run())


def test_the_first_worker_is_ready_before_the_others_start(short):
    plan = Programs(short, 3)
    fleet = fleet_of(plan)
    counts = []

    def ready():
        counts.append((len(fleet.ready), len(plan.started)))
        return len(fleet.ready) == 3

    watched(fleet, ready)
    assert max(started for ready, started in counts if ready == 0) == 1
    assert sorted(index for index, _ in plan.started) == [0, 1, 2]


def test_a_worker_that_cannot_start_ends_the_server(short):
    fleet = fleet_of(Programs(short, 2, "fails"))
    watched(fleet, lambda: fleet.failure is not None)
    assert not fleet.healthy
    with pytest.raises(ProcessError, match="a worker ended with exit code 3 before it was ready, see above"):
        raise fleet.failure


def test_a_later_worker_that_cannot_start_is_tried_again_with_growing_pauses(short, caplog):
    plan = Programs(short, 2, "good", "fails", "fails", "fails")
    fleet = fleet_of(plan)
    watched(fleet, lambda: len(fleet.ready) == 2)
    assert [index for index, _ in plan.started] == [0, 1, 1, 1, 1]
    lines = [record.fields for record in caplog.records if "started again" in record.getMessage()]
    assert [(line["worker"], line["code"], line["seconds"]) for line in lines] == [
        (1, 3, 0.05),
        (1, 3, 0.1),
        (1, 3, 0.2),
    ]


def test_a_system_without_a_free_process_is_waited_for(short, caplog):
    plan, failures = Programs(short, 1), [OSError(11, "Resource temporarily unavailable")] * 2
    start = plan.start
    plan.start = lambda *given: start(*given) if not failures else _raise(failures.pop())
    fleet = fleet_of(plan)
    watched(fleet, lambda: fleet.ready)
    lines = [record.fields for record in caplog.records if "started again" in record.getMessage()]
    assert [line["seconds"] for line in lines] == [0.05, 0.1]
    assert "temporarily unavailable" in lines[0]["why"]


def _raise(error):
    raise error


def test_a_worker_whose_plm_does_not_run_is_replaced(short, monkeypatch):
    monkeypatch.setattr(workers, "HEALTH_SECONDS", 0.1)
    plan = Programs(short, 1, "broken")
    fleet = fleet_of(plan)
    watched(fleet, lambda: len(plan.started) == 2 and fleet.ready)


def test_a_worker_that_does_not_end_is_killed(short):
    plan = Programs(short, 1, "stubborn")
    fleet, process = fleet_of(plan), []

    def ready():
        process.extend(worker.process for worker in fleet.ready)
        return process

    watched(fleet, ready)
    assert process[0].returncode == -signal.SIGKILL


def test_a_request_to_reread_waits_for_the_store(short, monkeypatch):
    monkeypatch.setattr("pema.serving.store.PATIENCE", 0.01)
    store, other = Store(short / "quotas.sqlite"), Store(short / "quotas.sqlite")
    fleet = fleet_of(Programs(short, 1), store)
    other.execute("BEGIN IMMEDIATE")
    fleet.request_reread()
    began = time.monotonic()

    def reread():
        if time.monotonic() - began > 0.6 and other._database.in_transaction:
            assert other.rereads() == 0
            other.execute("ROLLBACK")
        return other.rereads() == 1

    watched(fleet, reread)


@pytest.mark.parametrize(
    ("count", "devices", "parts"),
    [
        (2, "0 1", ["0", "1"]),
        (2, "0 1 2 3", ["0,1", "2,3"]),
        (4, "GPU-a GPU-b", ["GPU-a", "GPU-b", "GPU-a", "GPU-b"]),
        (3, "7", ["7", "7", "7"]),
    ],
)
def test_gpus_are_divided(count, devices, parts):
    assert environments(count, 8, devices.split(), {}) == [{DEVICES: part} for part in parts]


def test_gpus_that_cannot_be_divided():
    with pytest.raises(
        ConfigError, match="3 workers cannot share 2 GPUs evenly: give --workers a divisor or a multiple of 2"
    ):
        environments(3, 8, ["0", "1"], {})


def test_cores_are_divided():
    assert environments(3, 8, [], {}) == [{"OMP_NUM_THREADS": "2"}] * 3
    assert environments(3, 2, [], {}) == [{"OMP_NUM_THREADS": "1"}] * 3
    assert environments(2, 8, [], {"OMP_NUM_THREADS": "5"}) == [{}, {}]
    assert 1 <= workers.visible_cores() <= (os.cpu_count() or 1)


def test_the_gpus_that_are_visible(monkeypatch):
    def asked(*_, **__):
        return subprocess.CompletedProcess([], 0, "2\n", "")

    monkeypatch.setattr(subprocess, "run", asked)
    monkeypatch.delenv(DEVICES, raising=False)
    assert workers.visible_devices() == ["0", "1"]
    monkeypatch.setenv(DEVICES, "GPU-a, GPU-b,")
    assert workers.visible_devices() == ["GPU-a", "GPU-b"]
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: subprocess.CompletedProcess([], 1, "", "no torch"))
    assert workers.visible_devices() == []


def test_a_path_that_is_too_long_for_a_socket(tmp_path):
    folder = tmp_path / ("x" * 100)
    plan = Plan("embedded", {}, None, tmp_path / "quotas.sqlite", folder, [{}])
    fleet = fleet_of(plan)
    watched(fleet, lambda: fleet.failure is not None)
    with pytest.raises(ConfigError, match=r"x{100}/\w+\.sock is too long for a socket: set TMPDIR"):
        raise fleet.failure


def test_a_worker_has_the_policy_in_force_and_not_the_file(short, monkeypatch):
    started = []
    monkeypatch.setattr(subprocess, "Popen", lambda command, **_: started.append(json.loads(command[-1])))
    monkeypatch.setattr(worker, "run", lambda app, lifecycle, reread, listener: apps.append((app, lifecycle)))
    monkeypatch.setattr(worker.LocalPLM, "load", lambda name, **_: name)
    monkeypatch.setattr(worker, "Service", lambda plm, policy, metrics, store, name: services.append((plm, policy)))
    rules = Policy(keys=(key(tokens_per_day=7, requests_per_second=0.5),), limits=Limits(connections=9))
    with tempfile.TemporaryDirectory(prefix="pema-") as name:
        folder, apps, services = Path(name), [], []
        (folder / "policy.toml").write_text("[limits]\nconnec", encoding="utf-8")
        plan = Plan("embedded", {}, folder / "policy.toml", folder / "quotas.sqlite", folder, [{}])
        plan.start(0, rules, 3)
        worker.work(started[0])
        app, lifecycle = apps[0]
        lifecycle._load()
        assert services == [("embedded", rules)]
        assert app.state.reloader._number == 3
        assert not list(folder.glob("*.json"))


def children(number):
    return [int(child) for child in Path(f"/proc/{number}/task/{number}/children").read_text().split()]


@pytest.fixture
def sockets(monkeypatch):
    """A folder for sockets, whose paths may have about 100 characters; those of `tmp_path` are longer."""
    with tempfile.TemporaryDirectory(prefix="pema-") as name:
        monkeypatch.setenv("TMPDIR", name)
        yield Path(name)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_texts_outlive_a_worker_and_the_end_leaves_nothing(folder, tmp_path, sockets, monkeypatch):
    """Three clients generate, and one of two workers is killed: every text is that of the PLM in the process."""
    monkeypatch.setenv("PEMA_API_KEY", KEYS["acme"])
    (tmp_path / "policy.toml").write_text('quota_file = "quotas.sqlite"\n' + POLICY + MORE, encoding="utf-8")
    command = [*PEMA, "serve", str(folder / "plm"), "--port", "0", "--workers", "2", "--policy", "policy.toml"]
    with (tmp_path / "out").open("w") as out, (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(command, stdout=out, stderr=log, cwd=tmp_path)
    try:
        until(lambda: (tmp_path / "out").read_text().endswith("\n") or process.poll() is not None, LONG)
        url = (tmp_path / "out").read_text().split()[-1]
        metrics = {"url": f"{url}/metrics", "headers": bearer()}
        until(lambda: 'worker="1"' in httpx2.get(**metrics).text, LONG)
        local = LocalPLM.load(folder / "plm", dtype="float32")
        expected = generate(local, None, SOURCES, TASK, NoAdapter(), max_new_tokens=12)
        plain, steps, killed = Connection.request, [], []

        def request(connection, method, path, body=None, **more):
            if path.endswith("/advance"):
                steps.append(path)
                if len(steps) == 12:
                    killed.append(children(process.pid)[0])
                    os.kill(killed[0], signal.SIGKILL)
            return plain(connection, method, path, body, **more)

        monkeypatch.setattr(Connection, "request", request)

        def texts(_):
            plm = RemotePLM(url, dtype="float32", connection=Connection(url, patience=LONG))
            return generate(plm, None, SOURCES, TASK, NoAdapter(), max_new_tokens=12)

        with ThreadPoolExecutor(3) as pool:
            assert list(pool.map(texts, range(3))) == [expected] * 3
        assert killed
        until(lambda: len(children(process.pid)) == 2 and killed[0] not in children(process.pid), LONG)
        process.send_signal(signal.SIGTERM)
        assert process.wait(LONG) == 0
        lines = [json.loads(line) for line in (tmp_path / "log").read_text(encoding="utf-8").splitlines()]
        assert {
            line.get("worker") for line in lines if line["message"] == "request" and line["endpoint"] == "sessions"
        } <= {0, 1}
        assert sum(line["message"] == "a worker has ended and is started again" for line in lines) == 1
        assert not list(sockets.iterdir())
        quota = Store(tmp_path / "quotas.sqlite").execute("SELECT SUM(amount) FROM spent WHERE window = 'day'")
        assert quota[0][0] > len(SOURCES) * 3
    finally:
        process.kill()
        process.wait(LONG)


def test_a_plm_that_cannot_be_loaded_is_said_once(tmp_path):
    (tmp_path / "plm").mkdir()
    (tmp_path / "plm" / "config.json").write_text("{}", encoding="utf-8")
    command = [*PEMA, "serve", "plm", "--port", "0", "--workers", "2"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=LONG)
    assert done.returncode == 1
    said = [line for line in done.stderr.splitlines() if line.startswith("pema: ")]
    assert len(said) == 2
    assert re.search("a worker ended with exit code [12] before it was ready", said[1])
