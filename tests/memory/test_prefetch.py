"""Prefetching: the same items, a few of them ahead, and an end at any place."""

import threading
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pema.memory.prefetch import AHEAD, prefetch


@given(items=st.lists(st.none() | st.integers()))
def test_the_same_items(items):
    assert list(prefetch(iter(items))) == items


def wait_for(condition):
    deadline = time.monotonic() + 10
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.001)
    assert condition()


def test_another_thread_is_a_few_items_ahead():
    taken = []

    def items():
        for item in range(100):
            taken.append((item, threading.current_thread()))
            yield item

    ahead = prefetch(items())
    assert next(ahead) == 0
    wait_for(lambda: len(taken) == 1 + AHEAD)
    time.sleep(0.05)
    assert len(taken) == 1 + AHEAD
    assert len({thread for _, thread in taken}) == 1
    assert taken[0][1] is not threading.current_thread()
    assert next(ahead) == 1
    wait_for(lambda: len(taken) == 2 + AHEAD)
    ahead.close()
    assert not taken[0][1].is_alive()
    assert len(taken) <= 2 + 2 * AHEAD


def test_an_error_comes_in_its_place():
    def items():
        yield 1
        raise ValueError("the shard is damaged")

    ahead = prefetch(items())
    assert next(ahead) == 1
    with pytest.raises(ValueError, match="the shard is damaged"):
        next(ahead)
    assert list(ahead) == []
