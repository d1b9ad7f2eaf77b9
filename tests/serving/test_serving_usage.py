"""Usage per key: in the log per day, in the metrics, and for the key itself."""

import datetime
import logging

import pytest
from served import bearer, key, refusal, served

from pema.serving.policy import Policy
from pema.serving.usage import Usage

BODY = {"sequences": [[1, 5, 6, 7]], "starts": [1]}


def lines(caplog):
    return [record.fields for record in caplog.records if record.name == "pema.serving.usage"]


def test_the_sums_of_a_day_are_logged_when_it_ends(caplog):
    caplog.set_level(logging.INFO, "pema")
    day = [datetime.date(2026, 11, 26)]
    usage = Usage(lambda: day[0])
    usage.count("b", 5)
    usage.count("a", 7)
    usage.count("a", 0)
    usage.roll()
    assert not lines(caplog)
    day[0] += datetime.timedelta(1)
    usage.count("a", 1)
    assert lines(caplog) == [
        {"key": "a", "day": "2026-11-26", "requests": 2, "tokens": 7},
        {"key": "b", "day": "2026-11-26", "requests": 1, "tokens": 5},
    ]
    usage.close()
    assert lines(caplog)[2:] == [{"key": "a", "day": "2026-11-27", "requests": 1, "tokens": 1}]
    usage.close()
    assert len(lines(caplog)) == 3


def test_a_key_sees_its_quotas_and_the_owner_its_usage(plm, caplog):
    caplog.set_level(logging.INFO, "pema")
    keys = (
        key("acme", tokens_per_day=10, requests_per_second=50.0),
        key("other", endpoints=("plm", "metrics", "predict"), contexts=("predicted", "teacher")),
    )
    with served(plm, Policy(keys=keys)) as client:
        about = client.get("/v1/plm", headers=bearer("acme")).json()
        assert about["requests_per_second"] == 50
        day, heads = about["quotas"]
        expected = {"unit": "tokens", "seconds": 86400, "limit": 10, "left": 10, "more_in": 0, "full_in": 0}
        assert day == expected
        assert (heads["unit"], heads["left"], heads["seconds"]) == ("heads", 60, 3600)
        for _ in range(2):
            assert client.post("/v1/represent", json=BODY, headers=bearer("acme")).status_code == 200
        refusal(client.post("/v1/represent", json=BODY, headers=bearer("acme")), 429, "quota_spent")
        refusal(client.post("/v1/represent", json=BODY, headers={"Authorization": "Bearer no"}), 401, "unknown_key")
        (day, _) = client.get("/v1/plm", headers=bearer("acme")).json()["quotas"]
        assert day["left"] == 2
        assert 86400 - 1440 < day["more_in"] <= day["full_in"] <= 86400 + 1440

        # Another key sees nothing of it, and what it may not request is not offered to it.
        other = client.get("/v1/plm", headers=bearer("other")).json()
        assert [quota["unit"] for quota in other["quotas"]] == ["heads"]
        assert other["requests_per_second"] is None
        assert other["endpoints"] == ["plm", "metrics", "predict"]
        assert other["contexts"] == ["predicted"]

        text = client.get("/metrics", headers=bearer("other")).text
        assert 'pema_key_tokens_total{key="acme"} 8.0' in text
        assert 'pema_key_requests_total{key="acme"} 5.0' in text
        assert 'pema_key_requests_total{key="other"} 1.0' in text
        assert text.count("pema_key_requests_total{") == 2
        refusal(client.get("/metrics", headers=bearer("acme")), 403, "not_allowed")
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    assert {"key": "acme", "day": today, "requests": 6, "tokens": 8} in lines(caplog)


@pytest.mark.parametrize("contexts", [("predicted",), ("teacher",)])
def test_contexts_are_offered_with_their_endpoint_only(plm, contexts):
    with served(plm, Policy(keys=(key(endpoints=("plm",), contexts=contexts),))) as client:
        assert client.get("/v1/plm", headers=bearer()).json()["contexts"] == []
