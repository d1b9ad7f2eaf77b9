"""One JSON line a request, and nothing in any line that a client sent."""

import io
import json
import logging
import re

import pytest
from served import bearer, key, opened, served

from pema.serving.logs import JSONLines
from pema.serving.policy import Policy

SECRET = [287, 311, 293, 278]


@pytest.fixture
def lines():
    """Everything that is logged anywhere, as the server would write it."""
    stream, handlers = io.StringIO(), []
    handler = logging.StreamHandler(stream)
    handler.setFormatter(JSONLines())
    for name in ("pema", "uvicorn", "fastapi", "starlette", "asyncio"):
        logger = logging.getLogger(name)
        handlers.append((logger, logger.level))
        logger.addHandler(handler)
        logger.setLevel(logging.DEBUG)
    yield lambda: [json.loads(line) for line in stream.getvalue().splitlines()]
    for logger, level in handlers:
        logger.removeHandler(handler)
        logger.setLevel(level)


def test_a_request_is_one_line_of_names_and_numbers(plm, lines):
    with served(plm, Policy(keys=(key("acme"),))) as client:
        answer = client.post("/v1/represent", json={"sequences": [[1, 2, 3]], "starts": [1]}, headers=bearer())
        client.get("/v1/nowhere")
        client.post("/v1/represent", json={"sequences": [[1, 2, 3]], "starts": [7]}, headers=bearer())
    good, nowhere, bad = [line for line in lines() if line["message"] == "request" and line["level"] == "info"]
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}\+00:00", good.pop("time"))
    assert good.pop("request") == answer.headers["X-Request-Id"]
    assert good.pop("milliseconds") > 0
    assert good == {
        "level": "info",
        "logger": "pema.serving.requests",
        "message": "request",
        "endpoint": "represent",
        "key": "acme",
        "status": 200,
        "sequences": 1,
        "tokens": 3,
        "representations": 2,
    }
    assert (nowhere["endpoint"], nowhere["status"], nowhere["code"]) == ("other", 404, "no_such_endpoint")
    assert (bad["key"], bad["status"], bad["code"], bad["tokens"]) == ("acme", 422, "invalid", 0)


def test_no_line_holds_a_prompt_a_token_a_target_a_session_or_a_key(plm, lines, monkeypatch):
    from pema.owner.local.session import LocalSession

    def broken(self, tokens, parents=None):
        raise RuntimeError(f"cannot go on with {tokens} my secret prompt")

    with served(plm, Policy(keys=(key("acme"),))) as client:
        client.headers.update(bearer())
        client.post("/v1/represent", json={"sequences": [SECRET], "starts": [2]})
        client.post("/v1/represent", json={"sequences": [[*SECRET, 99999]], "starts": [2]})
        client.post("/v1/predict", json={"prompts": [SECRET], "steps": [8]})
        client.post("/v1/predict", json={"prompts": ["my secret prompt"], "steps": [8]})
        client.post("/v1/predict", content=b"my secret prompt")
        client.get("/v1/my secret prompt?and=my secret prompt")
        client.get("/v1/plm", headers={"Authorization": "Bearer my secret key"})
        _, path = opened(client, [SECRET])
        client.post(f"{path}/advance", json={"step": 1, "tokens": [SECRET[0]]})
        monkeypatch.setattr(LocalSession, "_run", broken)
        assert client.post(f"{path}/advance", json={"step": 2, "tokens": [SECRET[1]]}).status_code == 500
    written = "\n".join(map(json.dumps, lines()))
    assert written.count('"message": "request"') >= 10
    (failed,) = [line for line in lines() if line["message"] == "a request failed"]
    assert failed["error"] == "RuntimeError"
    assert any(place.startswith("test_serving_logs.py:") for place in failed["at"])
    assert "secret" not in written
    assert path.removeprefix("/v1/sessions/") not in written
    assert bearer()["Authorization"].split()[1] not in written
    # Fields whose numbers are times or random may hold these digits by chance.
    counted = re.sub(r'"(time|request|milliseconds)": [^,}]*', "", written)
    for token in (*SECRET, 99999):
        assert not re.search(rf"\b{token}\b", counted)
