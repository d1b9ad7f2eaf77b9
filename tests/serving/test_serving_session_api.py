"""Decoding sessions over ASGI."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from served import bearer, key, opened, refusal, served, tensors

from pema.serving.policy import Limits, Policy

PROMPTS = [[1, 5, 6, 7], [1, 20]]


def f(plm, context):
    """The representation of one context, from a pass of its own."""
    return next(iter(plm.represent([[*context, 0]], [len(context)]))).representations[0]


def check(plm, found, contexts):
    expected = torch.stack([f(plm, context) for context in contexts])
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def advanced(client, path, step, words, parents=None, **more):
    body = {"step": step, "tokens": words, "parents": parents}
    return tensors(client.post(f"{path}/advance", json=body, **more))[0]["representations"]


def test_rows_grow_split_and_leave(client, plm):
    found, path = opened(client, PROMPTS)
    contexts = PROMPTS
    check(plm, found, contexts)
    steps = [([9, 8], None), ([3, 4, 5], [0, 1, 0]), ([6], [2]), ([7, 8], [0, 0])]
    for step, (words, parents) in enumerate(steps, start=1):
        found = advanced(client, path, step, words, parents)
        rows = range(len(contexts)) if parents is None else parents
        contexts = [[*contexts[row], word] for row, word in zip(rows, words, strict=True)]
        check(plm, found, contexts)
    assert client.delete(path).status_code == 204
    assert client.delete(path).status_code == 204
    body = {"step": 5, "tokens": [1, 2]}
    refusal(client.post(f"{path}/advance", json=body), 410, "session_expired")


def test_opening_tells_how_long_it_lives(plm):
    with served(plm, session_idle_seconds=0.2) as client:
        _, texts = tensors(client.post("/v1/sessions", json={"prompts": PROMPTS}), 201)
        assert texts["expires_in"] == "0.2"
        time.sleep(0.5)
        assert "pema_sessions 0.0" in client.get("/metrics").text  # It goes without anybody asking for it.
        path = f"/v1/sessions/{texts['session']}"
        answer = client.post(f"{path}/advance", json={"step": 1, "tokens": [1, 2]})
        assert "not used for 0.2 seconds" in refusal(answer, 410, "session_expired")["message"]
        assert 'pema_session_evictions_total{reason="idle"} 1.0' in client.get("/metrics").text


def test_a_step_that_is_sent_again_is_answered_again_and_taken_once(client, plm):
    _, path = opened(client, PROMPTS)
    first = advanced(client, path, 1, [9, 8])
    assert torch.equal(advanced(client, path, 1, [9, 8]), first)
    for step, words in ((1, [9, 9]), (3, [9, 8])):
        answer = client.post(f"{path}/advance", json={"step": step, "tokens": words})
        assert "the session has taken 1" in refusal(answer, 409, "wrong_step")["message"]
    check(plm, advanced(client, path, 2, [7, 7]), [[*PROMPTS[0], 9, 7], [*PROMPTS[1], 8, 7]])
    refusal(client.post(f"{path}/advance", json={"step": 1, "tokens": [9, 8]}), 409, "wrong_step")


def test_the_same_step_sent_many_times_at_once_is_taken_once(client, plm):
    _, path = opened(client, PROMPTS)
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: advanced(client, path, 1, [9, 8]), range(8)))
    assert all(torch.equal(one, found[0]) for one in found)
    check(plm, advanced(client, path, 2, [7, 7]), [[*PROMPTS[0], 9, 7], [*PROMPTS[1], 8, 7]])


def test_a_bad_step_leaves_the_session_as_it_was(client, plm):
    _, path = opened(client, PROMPTS)
    for body in ({"tokens": [1]}, {"tokens": [999, 1]}, {"tokens": [1], "parents": [7]}):
        refusal(
            client.post(f"{path}/advance", json={"step": 1} | body),
            422,
            f"{'unknown_token' if 999 in body['tokens'] else 'invalid'}",
        )
    check(plm, advanced(client, path, 1, [9, 8]), [[*PROMPTS[0], 9], [*PROMPTS[1], 8]])


def test_a_step_that_fails_within_the_plm_ends_the_session(client, monkeypatch):
    from pema.owner.local.session import LocalSession

    _, path = opened(client, PROMPTS)
    monkeypatch.setattr(LocalSession, "_run", broken)
    refusal(client.post(f"{path}/advance", json={"step": 1, "tokens": [1, 2]}), 500, "internal")
    monkeypatch.undo()
    refusal(client.post(f"{path}/advance", json={"step": 1, "tokens": [1, 2]}), 410, "session_expired")


def broken(*_):
    raise RuntimeError("a secret prompt")


def test_a_context_that_is_full_cannot_go_on(plm):
    with served(plm, sequence_tokens=6) as client:
        refusal(client.post("/v1/sessions", json={"prompts": [[1] * 6]}), 422, "too_long")
        _, path = opened(client, [[1] * 5, [1]])
        advanced(client, path, 1, [2, 2])
        refusal(client.post(f"{path}/advance", json={"step": 2, "tokens": [2, 2]}), 422, "too_long")
        # The row that is full may leave; the other one goes on.
        advanced(client, path, 2, [2], [1])


def test_a_session_belongs_to_the_key_that_opened_it(plm):
    with served(plm, Policy(keys=(key("acme"), key("other")))) as client:
        client.headers.update(bearer("acme"))
        _, path = opened(client, PROMPTS)
        answer = client.post(f"{path}/advance", json={"step": 1, "tokens": [1, 2]}, headers=bearer("other"))
        refusal(answer, 404, "unknown_session")
        assert client.delete(path, headers=bearer("other")).status_code == 204
        advanced(client, path, 1, [1, 2])


def test_sessions_make_room_for_one_another(plm):
    held = plm.open_session(PROMPTS).held_bytes
    with served(plm, session_bytes=int(2.5 * held), session_rows=9) as client:
        paths = [opened(client, PROMPTS)[1] for _ in range(3)]
        refusal(client.post(f"{paths[0]}/advance", json={"step": 1, "tokens": [1, 2]}), 410, "session_expired")
        advanced(client, paths[2], 1, [1, 2])
        refusal(client.post("/v1/sessions", json={"prompts": PROMPTS * 4}), 413, "session_too_large")
        assert 'pema_session_evictions_total{reason="memory"} 1.0' in client.get("/metrics").text


def test_so_many_sessions_and_rows_and_no_more(plm):
    with served(plm, sessions=2, session_rows=2) as client:
        paths = [opened(client, PROMPTS)[1] for _ in range(2)]
        answer = client.post("/v1/sessions", json={"prompts": PROMPTS})
        refusal(answer, 429, "too_many_sessions")
        assert 290 <= int(answer.headers["Retry-After"]) <= 300
        client.delete(paths[0])
        opened(client, PROMPTS)
        refusal(client.post("/v1/sessions", json={"prompts": [*PROMPTS, [3]]}), 413, "too_much")
        body = {"step": 1, "tokens": [1, 2, 3], "parents": [0, 0, 0]}
        refusal(client.post(f"{paths[1]}/advance", json=body), 413, "too_much")


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_the_precision_is_the_one_it_was_opened_with(client, dtype):
    found, path = opened(client, PROMPTS, dtype=dtype)
    assert found.dtype == advanced(client, path, 1, [1, 2]).dtype == getattr(torch, dtype)


def test_closing_waits_for_the_step_that_runs(client, plm, monkeypatch):
    from pema.owner.local.session import LocalSession

    _, path = opened(client, PROMPTS)
    running, go, advance = threading.Event(), threading.Event(), LocalSession._run

    def slow(self, *arguments):
        running.set()
        assert go.wait(10)
        return advance(self, *arguments)

    monkeypatch.setattr(LocalSession, "_run", slow)
    with ThreadPoolExecutor(2) as pool:
        step = pool.submit(advanced, client, path, 1, [9, 8])
        assert running.wait(10)
        closed = pool.submit(client.delete, path)
        time.sleep(0.05)
        assert not closed.done()
        go.set()
        check(plm, step.result(10), [[*PROMPTS[0], 9], [*PROMPTS[1], 8]])
        assert closed.result(10).status_code == 204


def test_limits_of_a_policy_are_kept(plm):
    policy = Policy(keys=(key("acme", tokens_per_minute=10),), limits=Limits())
    with served(plm, policy) as client:
        client.headers.update(bearer("acme"))
        _, path = opened(client, PROMPTS)  # 6 tokens
        advanced(client, path, 1, [1, 2])
        advanced(client, path, 2, [1, 2])
        answer = client.post(f"{path}/advance", json={"step": 3, "tokens": [1, 2]})
        refusal(answer, 429, "quota_spent")
        # The step was not taken: it may come again.
        refusal(client.post(f"{path}/advance", json={"step": 4, "tokens": [1, 2]}), 409, "wrong_step")


def test_steps_of_several_clients_share_a_forward_pass(client, plm):
    """While one step runs, others gather; then they go together, and each gets what it would get alone."""
    service = client.app.state.lifecycle.service()
    paths = [opened(client, [[1, 5 + i]])[1] for i in range(4)]
    hold, go = threading.Event(), threading.Event()

    def blocked():
        hold.set()
        assert go.wait(10)

    busy = service.batcher.call(blocked, key="acme", tokens=1)
    assert hold.wait(10)
    passes = []
    handle = plm.model.register_forward_hook(lambda *_: passes.append(1))
    with ThreadPoolExecutor(4) as pool:
        steps = [pool.submit(advanced, client, path, 1, [9 + i]) for i, path in enumerate(paths)]
        deadline = time.monotonic() + 10
        while service.batcher.waiting < 4:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        go.set()
        found = [step.result() for step in steps]
    handle.remove()
    busy.result()
    assert len(passes) == 1
    for i, f in enumerate(found):
        (alone,) = plm.represent([[1, 5 + i, 9 + i, 1]], [3])
        torch.testing.assert_close(f, alone.representations, atol=1e-5, rtol=1e-5)


def test_a_failure_of_steps_together_ends_those_sessions_by_name(client, monkeypatch):
    from pema.owner.local import session as module

    service = client.app.state.lifecycle.service()
    paths = [opened(client, [[1, 5 + i]])[1] for i in range(2)]
    hold, go = threading.Event(), threading.Event()
    service.batcher.call(lambda: (hold.set(), go.wait(10)), key="acme", tokens=1)
    assert hold.wait(10)
    monkeypatch.setattr(module.CachedContexts, "run_together", broken)
    with ThreadPoolExecutor(2) as pool:
        body = {"step": 1, "tokens": [9]}
        steps = [pool.submit(client.post, f"{path}/advance", json=body) for path in paths]
        while service.batcher.waiting < 2:
            time.sleep(0.01)
        go.set()
        for step in steps:
            assert "secret" not in refusal(step.result(), 410, "session_expired")["message"]
    assert len(service.sessions) == 0


def test_one_key_cannot_end_the_sessions_of_another(plm):
    """Ten sessions of a key were all closed by another key's."""
    held = plm.open_session([[1, 5, 6]]).held_bytes
    policy = Policy(keys=(key(), key("other")), limits=Limits(session_bytes=40 * held, sessions=100))
    with served(plm, policy) as client:
        paths = []
        for _ in range(10):
            _, texts = tensors(client.post("/v1/sessions", json={"prompts": [[1, 5, 6]]}, headers=bearer()), 201)
            paths.append(f"/v1/sessions/{texts['session']}/advance")
        for _ in range(60):
            client.post("/v1/sessions", json={"prompts": [[1, 5, 6]]}, headers=bearer("other"))
        for path in paths:
            tensors(client.post(path, json={"step": 1, "tokens": [7]}, headers=bearer()))


def test_a_step_that_would_grow_too_large_is_refused_and_the_session_goes_on(plm):
    held = plm.open_session([[1] * 100]).held_bytes
    with served(plm, session_bytes=20 * held) as client:
        _, path = opened(client, [[1] * 100])
        passes = []
        handle = plm.model.register_forward_hook(lambda *_: passes.append(1))
        step = {"step": 1, "tokens": [5] * 256, "parents": [0] * 256}
        error = refusal(client.post(f"{path}/advance", json=step), 413, "session_too_large")
        assert f"all sessions together have {20 * held}" in error["message"]
        assert not passes
        advanced(client, path, 1, [5] * 10, [0] * 10)
        handle.remove()
