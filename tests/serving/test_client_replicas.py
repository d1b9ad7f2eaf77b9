"""The client in front of several replicas: whatever a proxy does with its requests, the texts are the same."""

import itertools
import logging
import time
import zlib

import httpx2
import pytest
import torch
from served import bearer, key, listening, opened, refusal, served, tensors
from test_client import EXAMPLES, SOURCES, TASK, URL, adapter_of
from test_serving_reload import BODY, entry

from pema.adapter.schedule import GradualUnrolling
from pema.errors import ConfigError, MismatchError, OwnerError
from pema.generation.decoding import generate
from pema.memory.build import build_memory
from pema.owner.client.connection import Connection
from pema.owner.client.remote import RemotePLM
from pema.owner.local import LocalPLM
from pema.serving.metrics import Metrics
from pema.serving.policy import Policy
from pema.serving.service import Service


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch):
    monkeypatch.setattr("pema.owner.client.connection.time.sleep", lambda _: None)


@pytest.fixture
def replicas(plm):
    with served(plm) as first, served(plm) as second:
        yield [first, second]


@pytest.fixture(scope="module")
def expected(plm):
    """The texts of the PLM in the process, with beams, whose rows change places at every step."""
    return generate(plm, adapter_of(plm), SOURCES, TASK, GradualUnrolling(0.9), num_beams=2)


class Proxy(httpx2.BaseTransport):
    """A proxy in front of replicas: `choose` numbers the replica of a request, `before` may change things first."""

    def __init__(self, replicas, choose, before=lambda number, request: None):
        self.replicas, self.choose, self.before = replicas, choose, before
        self.dead, self.seen = set(), []

    def handle_request(self, request):
        number = self.choose(request) % len(self.replicas)
        self.seen.append((number, request.method, request.url.path))
        self.before(len(self.seen), request)
        if number in self.dead:
            return httpx2.Response(502, content=b"<html>Bad Gateway</html>")
        headers = {name: value for name, value in request.headers.items() if name != "host"}
        answer = self.replicas[number].request(
            request.method, request.url.path, content=request.read(), headers=headers
        )
        return httpx2.Response(answer.status_code, headers=dict(answer.headers), content=answer.content)

    def sessions(self):
        """The replicas that each session's steps were sent to."""
        steps = {}
        for number, _, path in self.seen:
            if path.endswith("/advance"):
                steps.setdefault(path, set()).add(number)
        return steps

    def plm(self):
        return RemotePLM(URL, dtype="float32", connection=Connection(URL, transport=self))


def by_hash(request):
    """As a proxy that hashes one header."""
    return zlib.crc32(request.headers["pema-route"].encode())


def in_turns():
    """As a proxy that knows nothing of sessions."""
    numbers = itertools.count()
    return lambda request: next(numbers)


def texts(plm, proxy):
    return generate(proxy.plm(), adapter_of(plm), SOURCES, TASK, GradualUnrolling(0.9), num_beams=2)


def test_a_proxy_that_hashes_the_route_keeps_sessions_and_spreads_the_rest(plm, replicas, expected):
    proxy = Proxy(replicas, by_hash)
    assert texts(plm, proxy) == expected
    across = proxy.plm()
    for _ in range(20):
        across.open_session([[1, 5]]).advance([6])
    assert all(len(numbers) == 1 for numbers in proxy.sessions().values())
    assert {number for numbers in proxy.sessions().values() for number in numbers} == {0, 1}
    for _ in range(20):
        list(across.represent([[1, 5, 6]], [1]))
    represented = [number for number, _, path in proxy.seen if path == "/v1/represent"]
    assert 1 <= sum(represented) <= 19  # the chance of one replica only is 2 in a million


@pytest.mark.parametrize("how", ["dead", "draining"])
def test_a_replica_that_goes_takes_no_text_with_it(plm, replicas, expected, how, caplog):
    proxy = Proxy(replicas, by_hash)

    def before(number, request):
        if number == 8:
            gone = proxy.seen[-1][0]
            if how == "dead":
                proxy.dead.add(gone)
            else:
                replicas[gone].app.state.lifecycle.draining = True

    proxy.before = before
    caplog.set_level(logging.WARNING, "pema.owner")
    assert texts(plm, proxy) == expected
    said = [record.getMessage() for record in caplog.records if "A decoding session is lost" in record.getMessage()]
    assert said
    assert all("begun again with its" in line and "the text does not change" in line for line in said)


def test_a_proxy_that_knows_no_sessions_is_named_before_it_costs_much(plm, replicas):
    proxy = Proxy(replicas, in_turns())
    with pytest.raises(OwnerError, match=r"do not reach the replica of http.* by the hash of the header Pema-Route"):
        texts(plm, proxy)
    assert len(proxy.sessions()) == 4


def test_a_cookie_of_a_proxy_is_returned(plm, replicas, expected):
    class Sticky(Proxy):
        def handle_request(self, request):
            answer = super().handle_request(request)
            answer.headers["Set-Cookie"] = f"replica={self.seen[-1][0]}; Path=/; HttpOnly"
            return answer

    turns = in_turns()

    def by_cookie(request):
        cookie = request.headers.get("cookie", "")
        return int(cookie.partition("=")[2]) if cookie else turns(request)

    proxy = Sticky(replicas, by_cookie)
    assert texts(plm, proxy) == expected
    assert len({number for number, _, _ in proxy.seen}) == 1


def test_two_plms_never_meet_in_one_memory(plm, tiny_plm, tiny_model, tiny_tokenizer, tmp_path):
    """A server that is started again with other weights, in the middle of a build, and a replica of another version."""
    model = tiny_model()
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(1.01)
    other = LocalPLM(model, tiny_tokenizer())
    assert other.description.fingerprint != plm.description.fingerprint
    with served(plm) as first, served(other) as second:
        proxy = Proxy([first, second], lambda request: len(proxy.seen) > 3)
        with pytest.raises(MismatchError, match=r"POST .*/v1/represent: the server now has another PLM than it had"):
            build_memory(proxy.plm(), EXAMPLES, TASK, tmp_path / "m", batch_tokens=8)
        session = (
            Proxy([first, second], lambda request: request.url.path.endswith("/advance")).plm().open_session([[1, 5]])
        )
        with pytest.raises(MismatchError, match="the server now has another PLM"):
            session.advance([6])


def test_replicas_with_one_quota_file_count_once_and_one_signal_reaches_both(plm, tmp_path):
    path = tmp_path / "policy.toml"
    text = 'quota_file = "quotas.sqlite"\n' + entry("acme", "tokens_per_day = 20")
    path.write_text(text + entry("other"), encoding="utf-8")
    policy = Policy.read(path)
    with listening(plm, policy, path=path) as (one, app), listening(plm, policy, path=path) as (two, _):
        for url, left in ((one, 16), (two, 12), (one, 8), (two, 4), (one, 0)):
            tensors(httpx2.post(f"{url}/v1/represent", json=BODY, headers=bearer()))
            about = httpx2.get(f"{two if url is one else one}/v1/plm", headers=bearer()).json()
            assert about["quotas"][0]["left"] == left
        refusal(httpx2.post(f"{two}/v1/represent", json=BODY, headers=bearer()), 429, "quota_spent")
        with httpx2.Client(base_url=two, headers=bearer("other"), timeout=60) as client:
            _, session = opened(client, [[1, 5]])
            path.write_text(text, encoding="utf-8")
            app.state.reloader.request()
            began = time.monotonic()
            while client.get("/v1/plm").status_code == 200:
                assert time.monotonic() - began < 30
            refusal(client.post(f"{session}/advance", json={"step": 1, "tokens": [7]}), 401, "unknown_key")


def test_a_replica_with_another_plm_does_not_start(plm, tiny_model, tiny_tokenizer, tmp_path):
    policy = Policy(keys=(key(),), quota_file=str(tmp_path / "quotas.sqlite"))
    other = LocalPLM(tiny_model(), tiny_tokenizer(), tap="norm_input")
    with served(plm, policy), pytest.raises(ConfigError, match=r"a live server that counts in .* has the PLM"):
        Service(other, policy, Metrics())
    Service(other, policy, Metrics()).close()
