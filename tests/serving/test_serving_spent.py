"""Spent quotas over a restart of the server."""

import json
import logging
import time

import pytest
from served import bearer, key, refusal, served

from pema.errors import ConfigError
from pema.serving import spent
from pema.serving.policy import Policy
from pema.serving.quota import SLICES, Quota

RULES = key(tokens_per_minute=100, tokens_per_day=1000)


def test_what_is_spent_leaves_after_a_restart_when_it_would_have_left(tmp_path):
    now, wall, path = [5000.0], [1e9], tmp_path / "quotas.json"
    first = Quota(RULES, lambda: now[0])
    for tokens in (30, 20):
        first.tokens(tokens)
        now[0] += 25
    first.head()
    spent.write(path, {"acme": first.save()}, lambda: wall[0])
    assert oct(path.stat().st_mode & 0o777) == "0o600"

    # Another process: its monotonic clock begins elsewhere, and 8 seconds have passed.
    later = [77.0]
    second = Quota(RULES, lambda: later[0])
    spent.restore(path, {"acme": second}, lambda: wall[0] + 8)
    now[0] += 8
    for _ in range(200):
        pairs = zip(first.remaining(), second.remaining(), strict=True)
        for a, b in pairs:
            assert (a.left, round(a.more_in, 3), round(a.full_in, 3)) == (
                b.left,
                round(b.more_in, 3),
                round(b.full_in, 3),
            )
        now[0] += 601
        later[0] += 601
    assert first.remaining()[1].left == 1000


def test_a_clock_that_was_set_back_or_on_gives_nothing_back_and_keeps_nothing_for_ever(tmp_path):
    path, now = tmp_path / "quotas.json", [5000.0]
    first = Quota(RULES, lambda: now[0])
    first.tokens(50)
    spent.write(path, {"acme": first.save()}, lambda: 1e9)
    second = Quota(RULES, lambda: now[0])
    spent.restore(path, {"acme": second}, lambda: 1e9 - 1e6)
    assert second.remaining()[1].left == 950
    assert second.remaining()[1].full_in <= 86400 * (1 + 1 / SLICES)
    third = Quota(RULES, lambda: now[0])
    spent.restore(path, {"acme": third}, lambda: 1e9 + 1e6)
    assert third.remaining()[1].left == 1000


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{",
        '{"format": "pema-quotas", "version": 2, "time": 0, "keys": {}}',
        '{"format": "pema-quotas", "version": 1, "time": "x", "keys": {}}',
        '{"format": "pema-quotas", "version": 1, "time": 0, "keys": []}',
        '{"format": "pema-quotas", "version": 1, "time": 0, "keys": {"acme": {"day": [[1]]}}}',
        '{"format": "pema-quotas", "version": 1, "time": 0, "keys": {"acme": {"day": [[1, -5]]}}}',
        '{"format": "pema-quotas", "version": 1, "time": 0, "keys": {"acme": {"day": 3}}}',
    ],
)
def test_a_damaged_file_is_refused_by_name(tmp_path, text):
    path = tmp_path / "quotas.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(
        ConfigError, match=r"quota file .*quotas\.json is damaged .*remove it to start with full quotas"
    ):
        spent.restore(path, {"acme": Quota(RULES)})


def test_a_disk_that_refuses_does_not_stop_the_server(tmp_path, caplog):
    caplog.set_level(logging.ERROR, "pema")
    (tmp_path / "file").touch()
    spent.write(tmp_path / "file" / "quotas.json", {})
    (line,) = caplog.records
    assert line.getMessage() == "spent quotas could not be written"
    assert "quotas.json" in line.fields["why"]


def test_a_server_that_starts_again_remembers(plm, tmp_path):
    policy = Policy(keys=(key(tokens_per_day=10),), quota_file=str(tmp_path / "quotas.json"))
    body = {"sequences": [[1, 5, 6, 7]], "starts": [1]}
    with served(plm, policy) as client:
        for _ in range(2):
            assert client.post("/v1/represent", json=body, headers=bearer()).status_code == 200
    assert set(json.loads((tmp_path / "quotas.json").read_text(encoding="utf-8"))["keys"]) == {"acme"}
    with served(plm, policy) as client:
        assert client.get("/v1/plm", headers=bearer()).json()["quotas"][0]["left"] == 2
        refusal(client.post("/v1/represent", json=body, headers=bearer()), 429, "quota_spent")


def test_it_is_written_while_the_server_runs(plm, tmp_path, monkeypatch):
    monkeypatch.setattr("pema.serving.lifecycle.SAVE_SECONDS", 0.05)
    path = tmp_path / "quotas.json"
    policy = Policy(keys=(key(tokens_per_day=10),), quota_file=str(path))
    with served(plm, policy) as client:
        deadline = time.monotonic() + 20
        while not path.exists():
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert client.get("/readyz").status_code == 200
