"""A policy that is reread while the server runs: whole or not at all, at once, and without forgetting what is spent."""

import contextlib
import json
import logging
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx2
import pytest
from served import KEYS, bearer, listening, opened, refusal, tensors
from test_serving_process import PATIENCE, ready, serving

from pema.owner.mask import Mask, MaskedPLM
from pema.serving.keys import digest
from pema.serving.policy import Policy

BODY = {"sequences": [[1, 5, 6, 7]], "starts": [1]}


def entry(name, *lines):
    return "\n".join(["[[keys]]", f'name = "{name}"', f'sha256 = "{digest(KEYS[name])}"', *lines, ""])


class Live:
    """A server in the process with a policy file."""

    def __init__(self, url, app, path, caplog):
        self.url, self.app, self.path, self.caplog = url, app, path, caplog
        self.clients = {name: httpx2.Client(base_url=url, headers=bearer(name)) for name in KEYS}

    def lines(self):
        return [record for record in self.caplog.records if record.name == "pema.serving.reload"]

    def reread(self, text):
        """Write the policy and have it reread: the log line."""
        self.path.write_text(text, encoding="utf-8")
        before = len(self.lines())
        self.app.state.reloader.request()
        deadline = time.monotonic() + 30
        while len(self.lines()) == before:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        (line,) = self.lines()[before:]
        return line


@contextlib.contextmanager
def live(plm, tmp_path, caplog, text):
    caplog.set_level(logging.INFO, "pema")
    path = tmp_path / "policy.toml"
    path.write_text(text, encoding="utf-8")
    with listening(plm, Policy.read(path), path=path) as (url, app):
        yield Live(url, app, path, caplog)


def test_keys_come_go_and_change_at_once(plm, tmp_path, caplog):
    with live(plm, tmp_path, caplog, entry("acme", "tokens_per_day = 100") + entry("other")) as server:
        acme, other, spare = (server.clients[name] for name in ("acme", "other", "spare"))
        tensors(acme.post("/v1/represent", json=BODY))
        _, kept = opened(acme, [[1, 5]])
        _, lost = opened(other, [[1, 5]])
        refusal(spare.get("/v1/plm"), 401, "unknown_key")

        text = "[limits]\nbatch_sequences = 2\n" + entry("acme", "tokens_per_day = 12") + entry("spare")
        line = server.reread(text)
        assert line.fields == {"added": ["spare"], "removed": ["other"], "changed": ["acme"]}

        about = acme.get("/v1/plm").json()
        assert about["limits"]["batch_sequences"] == 2
        assert (about["quotas"][0]["limit"], about["quotas"][0]["left"]) == (12, 6)
        refusal(acme.post("/v1/represent", json={"sequences": [[1, 2]] * 3, "starts": [1] * 3}), 413, "too_much")
        tensors(acme.post(f"{kept}/advance", json={"step": 1, "tokens": [7]}))
        assert spare.get("/v1/plm").status_code == 200
        refusal(other.post(f"{lost}/advance", json={"step": 1, "tokens": [7]}), 401, "unknown_key")
        assert len(server.app.state.lifecycle.service().sessions) == 1

        # A key that comes back has spent what it had spent, and its sessions stay closed.
        tensors(acme.post("/v1/represent", json=BODY))
        server.reread(entry("spare"))
        refusal(acme.get("/v1/plm"), 401, "unknown_key")
        server.reread(entry("acme", "tokens_per_day = 12") + entry("other"))
        assert acme.get("/v1/plm").json()["quotas"][0]["left"] == 1
        refusal(other.post(f"{lost}/advance", json={"step": 1, "tokens": [7]}), 410, "session_expired")


def test_a_key_with_another_mask_has_its_sessions_closed(plm, tmp_path, caplog):
    for name in ("one", "two"):
        assert Mask.create(tmp_path / name)
    masked = ('head = "masked"', 'mask_secret = "one"')
    with live(plm, tmp_path, caplog, entry("acme", *masked) + entry("other", *masked)) as server:
        acme, other = server.clients["acme"], server.clients["other"]
        (_, path), (_, kept) = opened(acme, [[1, 5]]), opened(other, [[1, 5]])
        first = acme.get("/v1/plm").json()["description"]
        server.reread(entry("acme", 'head = "masked"', 'mask_secret = "two"') + entry("other", *masked))
        error = refusal(acme.post(f"{path}/advance", json={"step": 1, "tokens": [7]}), 410, "session_expired")
        assert "the policy of this key changed" in error["message"]
        tensors(other.post(f"{kept}/advance", json={"step": 1, "tokens": [7]}))
        second = acme.get("/v1/plm").json()["description"]
        expected = MaskedPLM(plm, Mask.read(tmp_path / "two")).description
        assert second["fingerprint"] == expected.fingerprint != first["fingerprint"]


def test_what_a_removed_key_has_sent_is_answered_but_opens_no_session(plm, tmp_path, caplog):
    with live(plm, tmp_path, caplog, entry("acme") + entry("other")) as server, ThreadPoolExecutor(2) as pool:
        service = server.app.state.lifecycle.service()
        hold, go = threading.Event(), threading.Event()
        service.batcher.call(lambda: (hold.set(), go.wait(30)), key="held", tokens=0)
        assert hold.wait(10)
        other = server.clients["other"]
        contexts = pool.submit(other.post, "/v1/represent", json=BODY)
        session = pool.submit(other.post, "/v1/sessions", json={"prompts": [[1, 5]]})
        deadline = time.monotonic() + 30
        while service.batcher.waiting < 2:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        server.reread(entry("acme"))
        refusal(other.get("/v1/plm"), 401, "unknown_key")
        go.set()
        assert tensors(contexts.result(30))[0]["counts"].tolist() == [3]
        refusal(session.result(30), 410, "session_expired")
        assert len(service.sessions) == service.sessions.held == 0


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("[[keys]\n", "is not TOML"),
        (entry("other") + "tokens_per_dya = 5\n", "unknown setting 'keys[0].tokens_per_dya'"),
        (entry("other") + entry("acme", 'head = "masked"', 'mask_secret = "nowhere"'), "nowhere does not exist"),
        ("", "has no keys any more, which would let everybody in"),
        ('quota_file = "b"\n' + entry("other"), "names another quota_file, and a running server keeps the one"),
    ],
)
def test_a_policy_that_is_invalid_changes_nothing(plm, tmp_path, caplog, text, why):
    with live(plm, tmp_path, caplog, entry("acme", "tokens_per_day = 100")) as server:
        acme = server.clients["acme"]
        _, path = opened(acme, [[1, 5]])
        line = server.reread(text)
        assert line.levelno == logging.ERROR
        assert line.getMessage() == "the policy was not reread, the old one stays in force"
        assert why in line.fields["why"]
        tensors(acme.post(f"{path}/advance", json={"step": 1, "tokens": [7]}))
        assert acme.get("/v1/plm").json()["quotas"][0]["left"] == 97
        refusal(server.clients["other"].get("/v1/plm"), 401, "unknown_key")
        line = server.reread(entry("other"))
        assert line.fields["added"] == ["other"]


def test_a_server_without_a_policy_file_has_nothing_to_reread(plm, caplog):
    caplog.set_level(logging.INFO, "pema")
    with listening(plm) as (url, app):
        app.state.reloader.request()
        deadline = time.monotonic() + 30
        while not (lines := [r for r in caplog.records if r.name == "pema.serving.reload"]):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        assert "was started without a policy file" in lines[0].fields["why"]
        assert httpx2.get(f"{url}/v1/plm").status_code == 200


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="a signal of POSIX")
def test_a_process_rereads_its_policy_on_sighup(folder):
    with serving(folder, entry("acme")) as (process, url, log):
        path = max(folder.glob("*.toml"), key=lambda path: path.stat().st_mtime_ns)
        with httpx2.Client(base_url=url, headers=bearer("other"), timeout=PATIENCE) as other:
            ready(other)
            refusal(other.get("/v1/plm"), 401, "unknown_key")
            path.write_text(entry("other"), encoding="utf-8")
            process.send_signal(signal.SIGHUP)
            deadline = time.monotonic() + PATIENCE
            while other.get("/v1/plm").status_code != 200:
                assert time.monotonic() < deadline
                time.sleep(0.05)
            refusal(other.get("/v1/plm", headers=bearer("acme")), 401, "unknown_key")
        process.send_signal(signal.SIGTERM)
        assert process.wait(PATIENCE) == 0
        lines = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
        assert {"added": ["other"], "removed": ["acme"]}.items() <= next(
            line for line in lines if line["message"] == "the policy was reread"
        ).items()
