"""Client and server as processes of their own: the server dies in the middle, and what was begun is ended."""

import contextlib
import signal
import socket
import subprocess
import threading

import pytest
from served import KEYS
from test_serving_process import PATIENCE, PEMA, serving

from pema.adapter.schedule import NoAdapter
from pema.generation.decoding import generate
from pema.memory.build import build_memory
from pema.memory.reader import Memory
from pema.owner.client.connection import Connection
from pema.owner.client.remote import RemotePLM
from pema.owner.local import LocalPLM
from pema.serving.keys import digest
from pema.tasks.example import Example
from pema.tasks.registry import get_task

TASK = get_task("translation")
SOURCES = [f"the house {i} is small and the dog is here" for i in range(12)]
EXAMPLES = [Example(source, f"das Haus {i} ist klein") for i, source in enumerate(SOURCES)]
POLICY = f"""
[[keys]]
name = "acme"
sha256 = "{digest(KEYS["acme"])}"
"""


class Dying:
    """A server that is killed at the n-th request to `path` and started again on the same port."""

    def __init__(self, folder, monkeypatch, path, number):
        with socket.create_server(("127.0.0.1", 0)) as probe:
            self.port = probe.getsockname()[1]
        self.folder, self.stack = folder, contextlib.ExitStack()
        self.start()
        plain, seen = Connection.request, []

        def request(connection, method, where, body=None, **bounds):
            if path in where:
                seen.append(where)
                if len(seen) == number:
                    self.process.send_signal(signal.SIGKILL)
                    self.process.wait(PATIENCE)
                    threading.Thread(target=self.start).start()
            return plain(connection, method, where, body, **bounds)

        monkeypatch.setattr(Connection, "request", request)
        monkeypatch.setenv("PEMA_API_KEY", KEYS["acme"])
        self.starts = 0

    def start(self):
        serve = serving(self.folder, POLICY, "--port", self.port)
        self.process, self.url, _ = self.stack.enter_context(serve)
        self.starts = getattr(self, "starts", 0) + 1


@pytest.mark.parametrize("contexts", ["teacher", "predicted"])
def test_a_build_outlives_its_server(folder, tmp_path, monkeypatch, contexts):
    path = "/v1/represent" if contexts == "teacher" else "/v1/predict"
    server = Dying(folder, monkeypatch, path, 3)
    with server.stack:
        plm = RemotePLM(server.url, connection=Connection(server.url, patience=PATIENCE))
        built = build_memory(plm, EXAMPLES, TASK, tmp_path / "m", contexts=contexts, examples_per_shard=2)
        assert server.starts == 1
        whole = build_memory(plm, EXAMPLES, TASK, tmp_path / "whole", contexts=contexts, examples_per_shard=2)
    assert built.manifest.to_dict()["digest"] == whole.manifest.to_dict()["digest"]


def test_a_generation_outlives_its_server(folder, monkeypatch):
    local = LocalPLM.load(folder / "plm", dtype="float32")
    expected = generate(local, None, SOURCES, TASK, NoAdapter(), max_new_tokens=12)
    server = Dying(folder, monkeypatch, "/advance", 4)
    with server.stack:
        plm = RemotePLM(server.url, dtype="float32", connection=Connection(server.url, patience=PATIENCE))
        assert generate(plm, None, SOURCES, TASK, NoAdapter(), max_new_tokens=12) == expected
        assert server.starts == 1


def test_the_verbs_take_an_address_for_a_model(folder, tmp_path, monkeypatch):
    """`pema build`, `train` and `generate` with a server's address, on a machine that has no weights."""
    monkeypatch.setenv("PEMA_API_KEY", KEYS["acme"])
    (tmp_path / "a.en").write_text("\n".join(e.source for e in EXAMPLES) + "\n", encoding="utf-8")
    (tmp_path / "a.de").write_text("\n".join(e.target for e in EXAMPLES) + "\n", encoding="utf-8")

    def pema(*arguments):
        done = subprocess.run([*PEMA, *arguments], cwd=tmp_path, capture_output=True, text=True, timeout=PATIENCE)
        assert done.returncode == 0, done.stderr

    with serving(folder, POLICY) as (_, url, _):
        common = ["--plm", url, "--task", "translation"]
        pema("build", *common, "--source", "a.en", "--target", "a.de", "--contexts", "predicted", "-o", "memory")
        pema("train", "memory", "-o", "adapter", "--epochs", "2")
        pema("generate", "adapter", *common, "--input", "a.en", "-o", "remote.de", "--plm-dtype", "float32")
        pema("generate", "adapter", "--plm", str(folder / "plm"), "--task", "translation", "--input", "a.en",
             "-o", "local.de", "--plm-dtype", "float32")  # fmt: skip
    assert (tmp_path / "remote.de").read_text() == (tmp_path / "local.de").read_text()
    assert Memory.open(tmp_path / "memory").manifest.plm.name == "plm"
    assert not (folder / "plm" / "adapter").exists()
