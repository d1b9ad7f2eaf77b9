"""Effects of one client on others: bodies, quotas, queues, unread answers, clients that leave."""

import asyncio
import gc
import json
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given
from hypothesis import strategies as st
from served import bearer, key, refusal, served, tensors
from starlette.testclient import TestClient

from pema.owner.local.session import Step
from pema.serving import heads as heads_module
from pema.serving import lifecycle
from pema.serving.batcher import Batcher
from pema.serving.pending import PendingBytes
from pema.serving.policy import Limits, Policy
from pema.serving.quota import Quota
from pema.serving.refusal import Refusal
from pema.serving.store import Store

GOOD = {"sequences": [[1, 2, 3]], "starts": [1]}
JSON = {"Content-Type": "application/json"}
MIB = 1 << 20


def filled(before, piece, after):
    """A body of one MiB."""
    return before + piece * ((MIB - len(before) - len(after)) // len(piece) - 1) + after


BODIES = {
    "texts for tokens": filled(b'{"sequences": [[', b'"",', b'""]], "starts": [1]}'),
    "texts for sequences": filled(b'{"sequences": [', b'"",', b'""], "starts": [1]}'),
    "objects for sequences": filled(b'{"sequences": [', b"{},", b'{}], "starts": [1]}'),
    "negative tokens": filled(b'{"sequences": [[', b"-1,", b'1]], "starts": [1]}'),
    "null": filled(b'{"sequences": [[', b"null,", b'1]], "starts": [1]}'),
    "sequences of one token": filled(b'{"sequences": [', b"[1],", b'[1]], "starts": [1]}'),
    "one long sequence": filled(b'{"sequences": [[', b"1,", b'1]], "starts": [1]}'),
    "half a million starts": filled(b'{"sequences": [[1, 2]], "starts": [', b"1,", b"1]}"),
    "fields without end": filled(b"{", b'"a":1,', b'"b":1}'),
    "brackets": b"[" * MIB,
    "nested lists": b'{"sequences": ' + b"[" * (MIB // 2 - 40) + b"]" * (MIB // 2 - 40) + b', "starts": [1]}',
    "digits": filled(b'{"sequences": [[', b"9", b']], "starts": [1]}'),
    "one text": filled(b'{"sequences": "', b"a", b'", "starts": [1]}'),
    "escapes": filled(b'{"sequences": "', b"\\u0041", b'", "starts": [1]}'),
    "spaces": filled(b"{", b" ", b"}"),
    "not UTF-8": b"\xff" * MIB,
}


@pytest.mark.parametrize("path", ["represent", "predict", "sessions", "sessions/x/advance"])
@pytest.mark.parametrize("name", BODIES)
def test_a_megabyte_of_nonsense_costs_next_to_nothing(client, name, path):
    """A body of these took 3 s, and everybody waited for it."""
    assert len(BODIES[name]) <= MIB
    began = time.perf_counter()
    answer = client.post(f"/v1/{path}", content=BODIES[name], headers=JSON)
    seconds = time.perf_counter() - began
    assert answer.status_code in (413, 422)
    assert "aaaa" not in answer.text
    assert seconds < 0.5


def test_the_largest_request_that_is_allowed_is_let_through(plm):
    """Bounds on marks in the body turn no request away that the limits admit."""
    with served(plm, batch_sequences=300, batch_tokens=2000, session_rows=300) as client:
        body = {"sequences": [[1, 2]] * 300, "starts": [1] * 300, "dtype": "float32"}
        tensors(client.post("/v1/represent", json=body))
        tensors(client.post("/v1/predict", json={"prompts": [[1]] * 200, "steps": [8] * 200}))
        _, texts = tensors(client.post("/v1/sessions", json={"prompts": [[1]] * 300}), 201)
        step = {"step": 1, "tokens": [300] * 300, "parents": list(range(300))}
        tensors(client.post(f"/v1/sessions/{texts['session']}/advance", json=step))


def window(client, name="acme"):
    """Tokens that are counted against a key's day."""
    rests = client.app.state.lifecycle.service().accounts[name].quota.remaining()
    return next(rest.limit - rest.left for rest in rests if rest.seconds == 86400)


class Blocked:
    """A batcher that is held up inside the block."""

    def __init__(self, batcher):
        self.batcher, self.go, self.running = batcher, threading.Event(), threading.Event()

    def __enter__(self):
        self.batcher.call(lambda: (self.running.set(), self.go.wait(10)), key="held", tokens=0)
        assert self.running.wait(10)
        return self

    def __exit__(self, *_):
        self.go.set()


def waited(batcher, count):
    deadline = time.monotonic() + 10
    while batcher.waiting != count:
        assert time.monotonic() < deadline, batcher.waiting
        time.sleep(0.005)


def test_what_is_turned_away_is_not_charged(plm):
    policy = Policy(keys=(key(tokens_per_day=1000),), limits=Limits(queue_requests=1))
    with served(plm, policy) as client:
        client.headers.update(bearer())
        _, texts = tensors(client.post("/v1/sessions", json={"prompts": [[1, 5]]}), 201)
        batcher = client.app.state.lifecycle.service().batcher
        with Blocked(batcher):
            waiting = batcher.call(lambda: None, key="acme", tokens=0)
            before = window(client)
            for path, body in (
                ("represent", GOOD),
                ("predict", {"prompts": [[1]], "steps": [8]}),
                ("sessions", {"prompts": [[1]]}),
                (f"sessions/{texts['session']}/advance", {"step": 1, "tokens": [3]}),
            ):
                refusal(client.post(f"/v1/{path}", json=body), 503, "busy")
            assert window(client) == before == 2
        waiting.result(10)
        # The session is as it was: its step can be taken.
        tensors(client.post(f"/v1/sessions/{texts['session']}/advance", json={"step": 1, "tokens": [3]}))
        assert window(client) == 3


def test_what_fails_by_the_servers_fault_is_not_charged(plm, monkeypatch):
    import torch

    with served(plm, Policy(keys=(key(tokens_per_day=1000),))) as client:
        client.headers.update(bearer())

        def full(*_, **__):
            raise torch.OutOfMemoryError("full")

        monkeypatch.setattr(plm, "represent", full)
        refusal(client.post("/v1/represent", json=GOOD), 503, "no_room")
        assert window(client) == 0


@given(st.lists(st.tuples(st.integers(1, 50), st.booleans()), max_size=30))
def test_a_refund_is_as_if_nothing_had_been_asked(asks):
    clock = [0.0]
    quota, plain = (Quota(key(tokens_per_day=10_000), Store(clock=lambda: clock[0])) for _ in range(2))
    for tokens, refunded in asks:
        clock[0] += 100
        refund = quota.tokens(tokens)
        if refunded:
            refund()
        else:
            plain.tokens(tokens)
        assert quota.remaining() == plain.remaining()


def test_a_refund_that_comes_late_gives_nothing_back_twice():
    clock = [0.0]
    quota = Quota(key(tokens_per_minute=100), Store(clock=lambda: clock[0]))
    refund = quota.tokens(100)
    clock[0] = 100.0
    quota.tokens(100)
    refund()
    with pytest.raises(Refusal, match="1 more do not fit yet"):
        quota.tokens(1)


def leaving(app, leave, body, path):
    """A request whose client leaves when `leave` is set."""
    events = [{"type": "http.request", "body": json.dumps(body).encode()}]

    async def wrapped(scope, receive, send):
        async def some():
            if events:
                return events.pop()
            while not leave.is_set():
                await asyncio.sleep(0.005)
            return {"type": "http.disconnect"}

        await app(scope, some, send)

    return TestClient(wrapped).post(path, json=body, headers=bearer())


def test_the_work_of_a_client_that_left_is_dropped_and_not_charged(plm):
    with served(plm, Policy(keys=(key(tokens_per_day=1000),))) as client:
        client.headers.update(bearer())
        _, texts = tensors(client.post("/v1/sessions", json={"prompts": [[1, 5]]}), 201)
        step = f"/v1/sessions/{texts['session']}/advance"
        batcher = client.app.state.lifecycle.service().batcher
        for path, body in (
            ("/v1/represent", GOOD),
            ("/v1/predict", {"prompts": [[1]], "steps": [8]}),
            ("/v1/sessions", {"prompts": [[1]]}),
            (step, {"step": 1, "tokens": [3]}),
        ):
            leave = threading.Event()
            with Blocked(batcher), ThreadPoolExecutor(1) as pool:
                answer = pool.submit(leaving, client.app, leave, body, path)
                waited(batcher, 1)
                leave.set()
                refusal(answer.result(10), 400, "disconnected")
                assert batcher.waiting == 0
        assert window(client) == 2
        assert len(client.app.state.lifecycle.service().sessions) == 1
        tensors(client.post(step, json={"step": 1, "tokens": [3]}))


def test_a_session_whose_client_left_while_it_was_opened_is_closed(plm, monkeypatch):
    with served(plm) as client:
        leave, opened = threading.Event(), []
        plain = plm.open_session

        def slow(prompts):
            opened.append(plain(prompts))
            leave.set()
            time.sleep(0.2)
            return opened[-1]

        monkeypatch.setattr(plm, "open_session", slow)
        refusal(leaving(client.app, leave, {"prompts": [[1, 5]]}, "/v1/sessions"), 400, "disconnected")
        assert len(client.app.state.lifecycle.service().sessions) == 0
        assert opened[-1].held_bytes == 0


def test_a_step_that_was_taken_while_its_client_left_is_answered_to_whoever_asks_again(plm, monkeypatch):
    from pema.owner.local import session as module

    with served(plm) as client:
        _, texts = tensors(client.post("/v1/sessions", json={"prompts": [[1, 5]]}), 201)
        path, body = f"/v1/sessions/{texts['session']}/advance", {"step": 1, "tokens": [3]}
        leave, plain = threading.Event(), module.LocalSession._run

        def slow(session, contexts):
            leave.set()
            time.sleep(0.2)
            return plain(session, contexts)

        monkeypatch.setattr(module.LocalSession, "_run", slow)
        tensors(leaving(client.app, leave, body, path))
        monkeypatch.undo()
        again, _ = tensors(client.post(path, json=body))
        (alone,) = plm.represent([[1, 5, 3, 1]], [3])
        assert (again["representations"] - alone.representations).abs().max() < 1e-5


def test_an_answer_is_freed_with_its_future():
    """A cycle would keep twenty megabytes until the next collection."""
    batcher = Batcher(window=0.0, tokens=10, queue=4)
    gc.disable()
    try:
        future = batcher.call(Answer, key="a", tokens=1)
        alive = weakref.ref(future.result(10))
        batcher.call(lambda: None, key="a", tokens=1).result(10)
        del future
        deadline = time.monotonic() + 5
        while alive() is not None:
            assert time.monotonic() < deadline
            time.sleep(0.01)
    finally:
        gc.enable()
        batcher.close()


class Answer:
    """Can be referred to weakly."""


def test_memory_is_given_back_once_large_answers_are_read(plm, monkeypatch):
    given = []
    monkeypatch.setattr(lifecycle, "LARGE_BYTES", 1000)
    monkeypatch.setattr(lifecycle, "_give_back", lambda: given.append(1))
    with served(plm, session_idle_seconds=0.2) as client:
        pending = client.app.state.lifecycle.service().accounts["anybody"].pending
        give = pending.take(2000)
        time.sleep(0.3)
        assert not given
        give()
        time.sleep(0.5)
        assert given == [1]
        tensors(client.post("/v1/represent", json=GOOD))
        time.sleep(0.2)
        assert given == [1]


def test_giving_memory_back_is_tried_where_it_can_be():
    lifecycle._give_back()


def test_a_key_that_fills_the_queue_gives_a_place_to_another():
    batcher = Batcher(window=0.0, tokens=10, queue=4)
    with Blocked(batcher):
        greedy = [batcher.call(lambda: "greedy", key="greedy", tokens=1) for _ in range(4)]
        others = [batcher.call(lambda: "other", key="other", tokens=1) for _ in range(2)]
        for name in ("greedy", "other"):
            with pytest.raises(Refusal, match="4 requests wait for the PLM already"):
                batcher.call(lambda: 1, key=name, tokens=1)
        for late in greedy[2:]:
            with pytest.raises(Refusal, match="wait for the PLM already") as caught:
                late.result(1)
            assert caught.value.code == "busy"
    assert [future.result(10) for future in greedy[:2] + others] == ["greedy"] * 2 + ["other"] * 2
    batcher.close()


class CountedSession:
    """A session whose steps note which others they were taken with."""

    def __init__(self, rows):
        self.rows = rows


def test_steps_go_together_only_as_long_as_their_padded_rows_fit(monkeypatch):
    """One context of 500 tokens beside 60 rows of 4 would be padded to 500 each."""
    calls = []

    def together(steps):
        calls.append([len(step.tokens) for step in steps])
        for step in steps:
            step.session.representations = step.session.held_bytes = 0

    monkeypatch.setattr("pema.serving.batcher.advance_together", together)
    batcher = Batcher(window=0.0, tokens=1000, queue=100)

    def step(rows, width):
        return batcher.step(Step(CountedSession(rows), [1] * rows), key="a", tokens=rows, width=width)

    with Blocked(batcher):
        taken = [step(20, 4), step(20, 5), step(1, 500), step(20, 4), step(20, 6)]
    for future in taken:
        future.result(10)
    # 61 rows of 500 tokens are not joined; 1 and 20 would be over 1,000 as well.
    assert calls == [[20, 20], [1], [20, 20]]
    batcher.close()


def test_pending_bytes_of_a_key():
    pending = PendingBytes(100)
    give = pending.take(500)  # alone, whatever its size
    with pytest.raises(
        Refusal, match="500 bytes of this key's requests and answers are pending, 100 are allowed"
    ) as caught:
        pending.take(1)
    assert (caught.value.status, caught.value.code) == (429, "answers_unread")
    give()
    pending.take(60)
    with pytest.raises(Refusal):
        pending.take(41)
    pending.take(40)
    assert pending.held == 100


def test_the_head_is_packed_once_for_requests_that_come_together(plm, monkeypatch):
    packed = []

    def slow(tensors, texts):
        packed.append(1)
        time.sleep(0.2)
        return b"head"

    monkeypatch.setattr(heads_module, "pack", slow)
    with served(plm) as client, ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: client.get("/v1/head"), range(8)))
    assert {answer.content for answer in answers} == {b"head"}
    assert len(packed) == 1


def test_the_head_is_given_out_so_many_times_an_hour(plm):
    policy = Policy(keys=(key(), key("other")), limits=Limits(heads_per_hour=2))
    with served(plm, policy) as client:
        for _ in range(2):
            tensors(client.get("/v1/head", headers=bearer()))
        answer = client.get("/v1/head", headers=bearer())
        assert "2 times within an hour" in refusal(answer, 429, "too_many_heads")["message"]
        assert 3000 < int(answer.headers["Retry-After"]) <= 3700
        tensors(client.get("/v1/head", headers=bearer("other")))


def test_a_wait_that_nobody_makes_is_cut():
    for wait in (float("inf"), 1e300):
        assert Refusal(429, "x", "x", "x", retry_after=wait).headers == {"Retry-After": "86400"}


def test_a_padded_prompt_counts_with_its_padding(plm):
    with served(plm, batch_tokens=200) as client:
        body = {"prompts": [[1] * 50, *[[1]] * 4]}  # 54 tokens, 250 padded
        assert "250 tokens, padded" in refusal(client.post("/v1/sessions", json=body), 413, "too_much")["message"]
        tensors(client.post("/v1/sessions", json={"prompts": [[1] * 50, *[[1]] * 3]}), 201)
