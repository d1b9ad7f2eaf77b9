"""The store that processes share: counts that two of them never overspend, and that no kill loses or halves."""

import json
import logging
import signal
import sqlite3
import subprocess
import sys
import time

import pytest
from served import bearer, key, refusal, served

from pema.errors import ConfigError
from pema.serving.policy import Key, Policy
from pema.serving.quota import Quota
from pema.serving.refusal import Refusal
from pema.serving.store import LIVE_SECONDS, Store

SPENDER = """
import sys
from pathlib import Path
from pema.serving.policy import Key
from pema.serving.quota import Quota
from pema.serving.refusal import Refusal
from pema.serving.store import Store

most, each = map(int, sys.argv[2:])
quota = Quota(Key(name="acme", sha256="1" * 64, tokens_per_day=most), Store(Path(sys.argv[1])))
spent = 0
while True:
    try:
        quota.tokens(each)
    except Refusal as refusal:
        if refusal.code == "quota_spent":
            break
        continue
    spent += each
    print(spent, flush=True)
"""


def spenders(path, most, each, count):
    """Processes that spend one quota at once until nothing is left."""
    command = [sys.executable, "-c", SPENDER, str(path), str(most), str(each)]
    return [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(count)]


def spent(path, most=10**9):
    (day,) = [rest for rest in Quota(key(tokens_per_day=most), Store(path)).remaining() if rest.seconds == 86400]
    return day.limit - day.left


def last(output):
    numbers = [int(line) for line in output.split() if line.isdecimal()]
    return numbers[-1] if numbers else 0


def test_processes_that_spend_one_quota_at_once_never_overspend(tmp_path):
    path = tmp_path / "quotas.sqlite"
    Store(path).close()
    outputs = [process.communicate(timeout=120)[0] for process in spenders(path, 1000, 7, 3)]
    totals = [last(output) for output in outputs]
    assert sum(totals) == spent(path, 1000) == 994


def test_a_kill_in_the_middle_loses_nothing_and_halves_nothing(tmp_path):
    path = tmp_path / "quotas.sqlite"
    Store(path).close()
    total = 0
    for kills in (1, 2, 3):
        before, deadline = spent(path), time.monotonic() + 60
        (process,) = spenders(path, 10**9, 5, 1)
        while spent(path) == before:
            assert time.monotonic() < deadline
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        total += last(process.communicate(timeout=60)[0])
        (amounts,) = sqlite3.connect(path).execute(
            "SELECT COUNT(DISTINCT total) FROM (SELECT SUM(amount) AS total FROM spent GROUP BY window)"
        )
        assert amounts == (1,)  # both windows of every charge, or none
        assert total <= spent(path) <= total + 5 * kills  # the last charge may have come before its line


def test_a_writer_that_is_held_up_is_waited_for_and_then_refused(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("pema.serving.store.PATIENCE", 0.05)
    path = tmp_path / "quotas.sqlite"
    quota, other = Quota(key(tokens_per_day=10), Store(path)), sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(Refusal, match="cannot count what this key spends") as caught:
        quota.tokens(1)
    assert (caught.value.status, caught.value.code) == (503, "no_quotas")
    assert caplog.records[-1].getMessage() == "the quotas cannot be counted"
    assert "locked" in caplog.records[-1].fields["why"]
    other.execute("ROLLBACK")
    quota.tokens(10)


def test_a_full_disk_gives_nothing_away(tmp_path):
    path = tmp_path / "quotas.sqlite"
    store = Store(path)
    quota = Quota(key(tokens_per_day=10**9), store)
    store.execute("PRAGMA max_page_count = 20")

    def spend_everything():
        for i in range(10**6):
            Quota(Key(name=f"key{i}", sha256="1" * 64), store).tokens(1)

    with pytest.raises(Refusal, match="cannot count"):
        spend_everything()
    assert quota.remaining()[0].left == 10**9


def test_only_its_owner_may_read_it(tmp_path):
    path = tmp_path / "quotas.sqlite"
    path.touch(0o644)
    path.chmod(0o666)
    store = Store(path)
    Quota(key(), store).tokens(1)
    modes = {each.name: oct(each.stat().st_mode & 0o777) for each in tmp_path.iterdir()}
    assert modes == {f"quotas.sqlite{end}": "0o600" for end in ("", "-wal", "-shm")}


def wrong_table(path):
    sqlite3.connect(path).execute("CREATE TABLE other (a)")


def newer(path):
    Store(path).close()
    sqlite3.connect(path).execute("PRAGMA user_version = 99")


def damaged(path):
    store = Store(path)
    with store.transaction():
        for i in range(2000):
            store.execute("INSERT INTO spent VALUES (?, 'day', ?, 1)", (f"key{i}", i))
    store.close()
    content = bytearray(path.read_bytes())
    content[5000:12000] = bytes(7000)
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda path: path.write_text(json.dumps({"format": "pema-quotas", "version": 1})), "file is not a database"),
        (lambda path: path.write_bytes(b"\0" * 5000), "file is not a database"),
        (wrong_table, "it is another database, or of another version of pema"),
        (newer, "it is another database, or of another version of pema"),
        (damaged, "damaged|malformed"),
        (lambda path: path.mkdir(), "unable to open database file"),
    ],
)
def test_what_is_no_store_is_refused_by_name(tmp_path, make, why):
    path = tmp_path / "quotas.sqlite"
    make(path)
    with pytest.raises(ConfigError, match=rf"the quota file .*quotas\.sqlite cannot be used: .*({why}).*remove it"):
        Store(path)


def test_a_folder_that_does_not_exist(tmp_path):
    with pytest.raises(ConfigError, match=r"the quota file .* cannot be used: .*No such file"):
        Store(tmp_path / "nowhere" / "quotas.sqlite")


def test_a_file_system_without_shared_memory_is_refused(tmp_path, monkeypatch):
    plain = Store.execute

    def execute(store, statement, values=()):
        return [("delete",)] if "journal_mode" in statement else plain(store, statement, values)

    monkeypatch.setattr(Store, "execute", execute)
    with pytest.raises(ConfigError, match="processes cannot share memory on its file system"):
        Store(tmp_path / "quotas.sqlite")


def test_live_servers_of_one_store_have_one_plm(tmp_path):
    now, path = [1e9], tmp_path / "quotas.sqlite"
    store, other = Store(path, lambda: now[0]), Store(path, lambda: now[0])
    store.join("a", "1234", "small")
    other.join("b", "1234", "small")
    assert store.replicas() == 2
    with pytest.raises(ConfigError, match=r"live server that counts in .* has the PLM small, and this one has large"):
        other.join("c", "5678", "large")
    store.leave("a")
    now[0] += LIVE_SECONDS  # b was killed
    assert store.replicas() == 0
    other.join("c", "5678", "large")
    with pytest.raises(ConfigError, match="has the PLM large, and this one has small"):
        store.join("a", "1234", "small")


def test_a_server_that_starts_again_remembers(plm, tmp_path):
    policy = Policy(keys=(key(tokens_per_day=10),), quota_file=str(tmp_path / "quotas.sqlite"))
    body = {"sequences": [[1, 5, 6, 7]], "starts": [1]}
    with served(plm, policy) as client:
        for _ in range(2):
            assert client.post("/v1/represent", json=body, headers=bearer()).status_code == 200
    with served(plm, policy) as client:
        assert client.get("/v1/plm", headers=bearer()).json()["quotas"][0]["left"] == 2
        refusal(client.post("/v1/represent", json=body, headers=bearer()), 429, "quota_spent")


def test_a_store_that_fails_refuses_requests_and_does_not_end_the_server(plm, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("pema.serving.lifecycle.REPORT_SECONDS", 0.05)
    caplog.set_level(logging.ERROR, "pema")
    policy = Policy(keys=(key(tokens_per_day=100),), quota_file=str(tmp_path / "quotas.sqlite"))
    body = {"sequences": [[1, 5, 6, 7]], "starts": [1]}
    with served(plm, policy) as client:
        client.headers.update(bearer())
        store = client.app.state.lifecycle.service().store
        store.execute("DROP TABLE spent")
        answer = client.post("/v1/represent", json=body)
        refusal(answer, 503, "no_quotas")
        assert answer.headers["Retry-After"] == "1"
        assert "spent" not in answer.text
        assert client.get("/healthz").status_code == 200
        store.execute("DROP TABLE replicas")
        deadline = time.monotonic() + 30
        while not any("no common state" in record.getMessage() for record in caplog.records):
            assert time.monotonic() < deadline
            time.sleep(0.02)
