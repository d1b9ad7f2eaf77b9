import threading
import time

import pytest
import torch

from pema.errors import DataError
from pema.owner.contract import ContextRepresentations
from pema.serving.batcher import Batcher, Sequences
from pema.serving.refusal import Refusal


class CountingPLM:
    """f of a sequence is its sum; answers come in reverse; a sequence that holds 13 makes the whole call fail."""

    def __init__(self):
        self.calls = []

    def represent(self, sequences, starts, *, batch_tokens):
        self.calls.append([list(sequence) for sequence in sequences])
        if any(13 in sequence for sequence in sequences):
            raise DataError("13 is bad luck")
        for i in reversed(range(len(sequences))):
            yield ContextRepresentations(i, torch.tensor([[float(sum(sequences[i]) + starts[i])]]))

    predict = represent


class Held:
    """A batcher whose thread is held up until the block ends, so that requests gather."""

    def __init__(self, batcher):
        self.batcher, self.go, self.running = batcher, threading.Event(), threading.Event()

    def __enter__(self):
        self.batcher.call(lambda: (self.running.set(), self.go.wait(10)), key="held", tokens=0)
        assert self.running.wait(10)

    def __exit__(self, *_):
        self.go.set()


@pytest.fixture
def batcher():
    batcher = Batcher(window=0.0, tokens=10, queue=100)
    yield batcher
    batcher.close()


def ask(batcher, plm, *sequences, key="a", kind="represent"):
    work = Sequences(plm, kind, [list(s) for s in sequences], [1] * len(sequences))
    return batcher.contexts(work, key=key, tokens=sum(map(len, sequences)))


def values(future):
    return [float(answer.representations[0, 0]) for answer in future.result(10)]


def test_requests_are_joined_up_to_the_budget_and_answered_in_their_order(batcher):
    plm = CountingPLM()
    with Held(batcher):
        futures = [ask(batcher, plm, [i, 1], [i, 2]) for i in range(5)]  # 4 tokens each, 10 in a call
    assert [values(future) for future in futures] == [[i + 2, i + 3] for i in range(5)]
    assert [len(call) for call in plm.calls] == [4, 4, 2]


def test_what_differs_in_kind_or_plm_is_not_joined(batcher):
    plm, other = CountingPLM(), CountingPLM()
    with Held(batcher):
        futures = [ask(batcher, plm, [1]), ask(batcher, plm, [2], kind="predict"), ask(batcher, other, [3])]
    assert [values(future) for future in futures] == [[2], [3], [4]]
    assert (plm.calls, other.calls) == ([[[1]], [[2]]], [[[3]]])


def test_a_request_larger_than_the_budget_goes_alone(batcher):
    plm = CountingPLM()
    with Held(batcher):
        futures = [ask(batcher, plm, [1] * 30), ask(batcher, plm, [2])]
    assert [values(future) for future in futures] == [[31], [3]]
    assert len(plm.calls) == 2


def test_one_bad_request_does_not_cost_the_others_their_answer(batcher):
    plm = CountingPLM()
    with Held(batcher):
        good, bad, fine = ask(batcher, plm, [1]), ask(batcher, plm, [13]), ask(batcher, plm, [2])
    assert (values(good), values(fine)) == ([2], [3])
    with pytest.raises(DataError, match="bad luck"):
        bad.result(10)


def test_a_key_with_little_to_ask_is_not_behind_one_with_much(batcher):
    plm, order = CountingPLM(), []
    with Held(batcher):
        futures = [ask(batcher, plm, [1] * 9, key="much") for _ in range(6)]
        futures += [ask(batcher, plm, [2] * 9, key="little")]
        for i, future in enumerate(futures):
            future.add_done_callback(lambda _, i=i: order.append(i))
    for future in futures:
        future.result(10)
    assert order.index(6) <= 1


def test_a_key_that_was_away_does_not_get_the_time_back(batcher):
    plm, order = CountingPLM(), []
    ask(batcher, plm, [1], key="away").result(10)
    for _ in range(20):
        ask(batcher, plm, [1] * 9, key="busy").result(10)
    with Held(batcher):
        futures = [ask(batcher, plm, [1] * 9, key=name) for name in ["away"] * 4 + ["busy"] * 4]
        for name, future in zip(["away"] * 4 + ["busy"] * 4, futures, strict=True):
            future.add_done_callback(lambda _, name=name: order.append(name))
    for future in futures:
        future.result(10)
    assert "busy" in order[:3]


def test_requests_wait_for_one_another_while_there_is_nothing_else_to_do():
    plm, batcher = CountingPLM(), Batcher(window=0.3, tokens=6, queue=10)
    began = time.monotonic()
    first = ask(batcher, plm, [1, 2])
    # A step of a session does not wait with them.
    assert batcher.call(lambda: "step", key="b", tokens=1).result(10) == "step"
    assert time.monotonic() - began < 0.2
    second = ask(batcher, plm, [3])
    assert (values(first), values(second)) == ([4], [4])
    assert len(plm.calls) == 1
    # A full call does not wait.
    began = time.monotonic()
    assert values(ask(batcher, plm, [1] * 6)) == [7]
    assert time.monotonic() - began < 0.2
    batcher.close()


def test_a_full_queue_turns_requests_away():
    batcher = Batcher(window=0.0, tokens=10, queue=2)
    with Held(batcher):
        waiting = [batcher.call(lambda: 1, key="a", tokens=1) for _ in range(2)]
        assert batcher.waiting == 2
        with pytest.raises(Refusal, match="2 requests wait for the PLM already") as caught:
            batcher.call(lambda: 1, key="a", tokens=1)
    assert (caught.value.status, caught.value.headers) == (503, {"Retry-After": "1"})
    assert [future.result(10) for future in waiting] == [1, 1]
    batcher.close()


def test_closing_finishes_what_waits(batcher):
    plm = CountingPLM()
    with Held(batcher):
        futures = [ask(batcher, plm, [i] * 9) for i in range(4)]
        cancelled = ask(batcher, plm, [99])
        assert cancelled.cancel()
        closing = threading.Thread(target=batcher.close)
        closing.start()
    closing.join(10)
    assert [values(future) for future in futures] == [[9 * i + 1] for i in range(4)]
    assert not batcher.alive
    assert not any([99] in call for call in plm.calls)
    with pytest.raises(Refusal):
        ask(batcher, plm, [1])


def test_the_thread_survives_whatever_is_raised_in_it(batcher):
    def fail():
        raise SystemExit("no")

    with pytest.raises(SystemExit):
        batcher.call(fail, key="a", tokens=1).result(10)
    assert batcher.call(lambda: 1, key="a", tokens=1).result(10) == 1
