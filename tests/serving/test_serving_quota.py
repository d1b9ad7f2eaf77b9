import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st
from served import key

from pema.serving.quota import SLICES, Quota, Rate, Window
from pema.serving.refusal import Refusal
from pema.serving.store import Store


@given(
    most=st.integers(1, 100),
    asks=st.lists(st.tuples(st.floats(0, 30), st.integers(1, 40)), max_size=60),
)
def test_no_window_ever_holds_more_than_it_may(most, asks):
    window, now, spent = Window(Store(), "acme", "minute", 60.0, most), 0.0, []
    for pause, tokens in asks:
        now += pause
        wait = window.wait(tokens, now)
        assert (wait == float("inf")) == (tokens > most)
        if wait == 0:
            window.spend(tokens, now)
            spent.append((now, tokens))
        elif tokens <= most:
            # Coming back when told, and not before, is enough.
            assert 0 < wait <= 60 * (1 + 1 / SLICES) + 1e-6
            assert window.wait(tokens, now + wait + 1e-6) == 0
            now += wait + 1e-6
    for begin, _ in spent:
        assert sum(tokens for at, tokens in spent if begin <= at < begin + 60) <= most


@given(rate=st.floats(0.1, 50), pauses=st.lists(st.floats(0, 2), min_size=1, max_size=100))
def test_the_rate_holds_over_any_time(rate, pauses):
    bucket, now, taken = Rate(Store(), "acme", rate), 0.0, []
    for pause in pauses:
        now += pause
        wait = bucket.take(now)
        assert wait >= 0
        if wait == 0:
            taken.append(now)
    for i, begin in enumerate(taken):
        for j in range(i, len(taken)):
            assert j - i + 1 <= max(1.0, rate) + rate * (taken[j] - begin) + 1e-6


def test_refusals_say_when_to_come_back():
    now = [1000.0]
    rules = key(requests_per_second=2.0, tokens_per_minute=100, tokens_per_day=150)
    quota = Quota(rules, Store(clock=lambda: now[0]))
    quota.request()
    quota.request()
    with pytest.raises(Refusal, match="2 requests per second") as caught:
        quota.request()
    assert (caught.value.status, caught.value.headers) == (429, {"Retry-After": "1"})
    now[0] += 0.5
    quota.request()

    quota.tokens(80)
    with pytest.raises(Refusal, match="100 tokens per minute; 30 more") as caught:
        quota.tokens(30)
    assert caught.value.status == 429
    assert 50 <= int(caught.value.headers["Retry-After"]) <= 62
    now[0] += 62
    quota.tokens(30)
    with pytest.raises(Refusal, match="150 tokens per day; 50 more"):
        quota.tokens(50)
    with pytest.raises(Refusal, match=r"101 tokens are requested, the .* is 100 tokens per minute") as caught:
        quota.tokens(101)
    assert (caught.value.status, caught.value.code) == (413, "larger_than_quota")
    now[0] += 86400 * (1 + 1 / SLICES)
    quota.tokens(100)


def test_without_quotas_everything_goes():
    quota = Quota(key(), Store())
    for _ in range(1000):
        quota.request()
        quota.tokens(10**9)


def test_what_is_left_and_when_it_renews():
    now = [86400.0]
    quota = Quota(key(tokens_per_minute=100, tokens_per_day=1000), Store(clock=lambda: now[0]), heads_per_hour=2)
    minute, day, heads = quota.remaining()
    assert [(r.unit, r.seconds, r.limit, r.left) for r in (minute, day, heads)] == [
        ("tokens", 60.0, 100, 100),
        ("tokens", 86400.0, 1000, 1000),
        ("heads", 3600.0, 2, 2),
    ]
    assert minute.more_in == minute.full_in == 0
    quota.tokens(30)
    quota.head()
    now[0] += 30
    refund = quota.tokens(50)
    minute, day, heads = quota.remaining()
    assert (minute.left, day.left, heads.left) == (20, 920, 1)
    assert (minute.more_in, minute.full_in) == (31, 61)
    refund()
    minute, day, heads = quota.remaining()
    assert (minute.left, minute.more_in, minute.full_in) == (70, 31, 31)
    now[0] += minute.more_in
    assert quota.remaining()[0].left == 100
    assert quota.remaining()[1].left == 970


def test_a_change_of_the_limits_keeps_what_is_spent():
    now = [1000.0]
    quota = Quota(key(requests_per_second=2.0), Store(clock=lambda: now[0]), heads_per_hour=5)
    quota.request()
    quota.request()
    quota.tokens(80)
    quota.head()
    quota.change(key(requests_per_second=3.0, tokens_per_day=100), heads_per_hour=1)
    assert [(r.unit, r.left) for r in quota.remaining()] == [("tokens", 20), ("heads", 0)]
    quota.request()
    with pytest.raises(Refusal, match="3 requests per second"):
        quota.request()
    with pytest.raises(Refusal, match="100 tokens per day; 21 more"):
        quota.tokens(21)
    quota.change(key(tokens_per_day=50), heads_per_hour=1)
    assert quota.remaining()[0].left == 0
    with pytest.raises(Refusal, match="50 tokens per day") as caught:
        quota.tokens(50)
    assert caught.value.code == "quota_spent"
    for _ in range(10):
        quota.request()
    quota.change(key(requests_per_second=1.0), heads_per_hour=1)
    with pytest.raises(Refusal, match="1 requests per second"):
        quota.request()
    now[0] += 1
    quota.request()
    quota.tokens(10**9)


RULES = key(tokens_per_minute=100, tokens_per_day=1000, requests_per_second=2.0)


def test_two_processes_and_a_restart_count_as_one_server(tmp_path):
    """Any process, at any time, sees what a server that was never stopped would."""
    now, path = [1e9], tmp_path / "quotas.sqlite"
    alone, first = Quota(RULES, Store(clock=lambda: now[0])), Quota(RULES, Store(path, lambda: now[0]))
    second = Quota(RULES, Store(path, lambda: now[0]))
    for i in range(200):
        for quotas in ((alone,), (first, second)):
            (quota,) = quotas[i % len(quotas) :][:1]
            with contextlib.suppress(Refusal):
                quota.request()
                refund = quota.tokens(7 + i % 5)
                if i % 3 == 0:
                    refund()
            with contextlib.suppress(Refusal):
                quota.head()
        assert first.remaining() == second.remaining() == alone.remaining()
        if i % 50 == 49:  # a restart
            first = Quota(RULES, Store(path, lambda: now[0]))
        now[0] += 7.3 if i % 20 else 3000.0
    now[0] += 86400 * (1 + 1 / SLICES)
    assert [rest.left for rest in second.remaining()] == [100, 1000, 60]


def test_a_clock_that_was_set_back_or_on_gives_nothing_back_and_keeps_nothing_for_ever():
    now = [1e9]
    quota = Quota(key(tokens_per_day=100, requests_per_second=1.0), Store(clock=lambda: now[0]))
    quota.request()
    refund = quota.tokens(60)
    quota.tokens(30)
    now[0] -= 1e6
    with pytest.raises(Refusal, match="1 requests per second"):
        quota.request()
    (day, _) = quota.remaining()
    assert (day.left, day.more_in) == (10, day.full_in)
    assert day.full_in <= 86400 * (1 + 1 / SLICES)
    with pytest.raises(Refusal, match="20 more do not fit yet"):
        quota.tokens(20)
    refund()  # of a time that is to come: it is void
    assert quota.remaining()[0].left == 10
    now[0] += day.full_in
    assert quota.remaining()[0].left == 100
    quota.request()
