"""The registry of sessions, with a simulated clock."""

import asyncio
import contextlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pema.serving.policy import Limits
from pema.serving.refusal import Refusal
from pema.serving.sessions import Cost, Sessions


class FakeSession:
    closed = False

    def close(self):
        self.closed = True


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


def registry(*, keys=1, **limits):
    clock, evicted = Clock(), []
    values = {"sessions": 3, "session_bytes": 100, "session_idle_seconds": 60.0} | limits
    return Sessions(Limits(**values), evicted.append, clock, keys), clock, evicted


def add(sessions, key="a", held_bytes=10):
    return sessions.add(key, FakeSession(), "float32", [1], held_bytes)


def test_names_cannot_be_guessed_and_belong_to_their_key():
    sessions, _, _ = registry()
    entries = [add(sessions) for _ in range(3)]
    assert len({entry.name for entry in entries}) == 3
    assert all(len(entry.name) == 32 for entry in entries)
    assert sessions.find(entries[0].name, "a") is entries[0]
    for name, key in ((entries[0].name, "b"), ("guess", "a")):
        with pytest.raises(Refusal, match="There is no such session") as caught:
            sessions.find(name, key)
        assert (caught.value.status, caught.value.code) == (404, "unknown_session")


def test_idle_sessions_are_closed_and_used_ones_are_not():
    sessions, clock, evicted = registry()
    idle, used = add(sessions), add(sessions)
    clock.now += 40
    sessions.find(used.name, "a")
    clock.now += 30
    sessions.sweep()
    assert (idle.session.closed, used.session.closed, evicted) == (True, False, ["idle"])
    with pytest.raises(Refusal, match="not used for 60 seconds") as caught:
        sessions.find(idle.name, "a")
    assert (caught.value.status, caught.value.code) == (410, "session_expired")
    with pytest.raises(Refusal, match="There is no such session"):
        sessions.find(idle.name, "b")


def test_the_longest_unused_make_room():
    sessions, clock, evicted = registry()
    first, second = add(sessions, held_bytes=40), add(sessions, held_bytes=40)
    clock.now += 1
    sessions.find(first.name, "a")
    third = add(sessions, held_bytes=40)
    assert [e.session.closed for e in (first, second, third)] == [False, True, False]
    assert (sessions.held, len(sessions), evicted) == (80, 2, ["memory"])
    with pytest.raises(Refusal, match="it made room for others"):
        sessions.find(second.name, "a")


def test_a_session_in_the_middle_of_a_step_is_neither_idle_nor_evicted():
    async def run():
        sessions, clock, _ = registry()
        stepping, other = add(sessions, held_bytes=40), add(sessions, held_bytes=40)
        async with stepping.lock:
            clock.now += 1
            add(sessions, held_bytes=40)
            assert (stepping.session.closed, other.session.closed) == (False, True)
            clock.now += 1000
            sessions.sweep()
            assert not stepping.session.closed
        sessions.sweep()
        assert stepping.session.closed

    asyncio.run(run())


def test_a_session_that_outgrows_everything_goes_itself():
    sessions, _, evicted = registry()
    entry = add(sessions)
    sessions.stepped(entry, [2], 101, "request", b"answer")
    assert (entry.session.closed, evicted) == (True, ["memory"])
    with pytest.raises(Refusal, match="outgrew the memory"):
        sessions.find(entry.name, "a")


def test_a_session_that_never_fits_is_refused_at_once():
    sessions, _, _ = registry()
    kept, large = add(sessions), FakeSession()
    with pytest.raises(Refusal, match="needs 101 bytes, all sessions together have 100") as caught:
        sessions.add("a", large, "float32", [1], 101)
    assert (caught.value.status, large.closed, kept.session.closed) == (413, True, False)


def test_a_key_has_only_so_many_sessions_those_that_open_among_them():
    sessions, clock, _ = registry()
    add(sessions), add(sessions)
    clock.now += 20
    with sessions.place("a"):
        with pytest.raises(Refusal, match="3 live sessions") as caught, sessions.place("a"):
            pass
        assert (caught.value.status, caught.value.headers) == (429, {"Retry-After": "40"})
        with sessions.place("b"):
            pass
    with sessions.place("a"):
        pass


def test_one_key_cannot_end_the_sessions_of_another():
    sessions, _, evicted = registry(keys=2)
    quiet = [add(sessions, "quiet", 20), add(sessions, "quiet", 30)]
    greedy = [add(sessions, "greedy", 40) for _ in range(6)]
    assert [entry.session.closed for entry in quiet] == [False, False]
    assert [entry.session.closed for entry in greedy] == [True] * 5 + [False]
    assert evicted == ["memory"] * 5


def test_what_others_leave_unused_may_be_used_until_they_need_it():
    sessions, _, _ = registry(keys=4)
    borrowed = [add(sessions, "a", 30) for _ in range(3)]
    assert not any(entry.session.closed for entry in borrowed)
    own = add(sessions, "b", 25)
    assert [entry.session.closed for entry in borrowed] == [True, False, False]
    late = add(sessions, "c", 25)
    assert [entry.session.closed for entry in borrowed] == [True, True, False]
    assert not own.session.closed
    assert not late.session.closed


def test_a_step_is_checked_before_it_is_taken():
    """One row of 10 tokens and 40 bytes becomes two of 11 and 88 bytes; three would be 132."""
    sessions, _, evicted = registry()
    entry = sessions.add("a", FakeSession(), "float32", [10], 40)
    other = add(sessions, held_bytes=5)
    with (
        pytest.raises(Refusal, match="needs 132 bytes, all sessions") as caught,
        sessions.growing(entry, 3),
    ):
        raise AssertionError("taken")
    assert (caught.value.status, caught.value.code) == (413, "session_too_large")
    assert (entry.held, entry.session.closed, other.session.closed) == (40, False, False)
    with sessions.growing(entry, 2):
        assert sessions.held == 93
        sessions.stepped(entry, [11, 11], 86, "request", b"")
    assert (sessions.held, entry.width, evicted) == (91, 11, [])


def test_a_step_that_finds_no_memory_waits_for_another_time():
    async def run():
        sessions, _, _ = registry(keys=2, session_bytes=100)
        entry = sessions.add("a", FakeSession(), "float32", [10], 20)
        kept = add(sessions, "b", 50)
        stepping = add(sessions, "a", 25)
        async with stepping.lock:
            with (
                pytest.raises(Refusal, match="memory for sessions is in use") as caught,
                sessions.growing(entry, 2),
            ):
                raise AssertionError("taken")
        assert (caught.value.status, caught.value.code) == (503, "no_room")
        assert [e.session.closed for e in (entry, kept, stepping)] == [False, False, False]
        assert entry.held == 20

    asyncio.run(run())


def test_a_step_that_failed_holds_what_was_held_before():
    sessions, _, _ = registry()
    entry = sessions.add("a", FakeSession(), "float32", [10], 20)
    with pytest.raises(ValueError, match="no"), sessions.growing(entry, 2):
        raise ValueError("no")
    assert entry.held == sessions.held == 20


def test_memory_is_kept_for_sessions_that_are_being_opened():
    sessions, _, _ = registry(keys=2)
    old = add(sessions, "a", 60)
    with sessions.place("b", 50):
        assert old.session.closed  # it was above its share
        assert sessions.held == 50
        with pytest.raises(Refusal, match="The memory for sessions is in use"), sessions.place("a", 60):
            raise AssertionError("opened")
    assert sessions.held == 0
    with pytest.raises(Refusal, match="needs 101 bytes"), sessions.place("a", 101):
        raise AssertionError("opened")


@pytest.mark.parametrize("family", ["llama", "gemma3", "mamba", "opt"])
def test_the_cost_of_a_session_is_never_more_than_is_kept_for_it(tiny_plm, family):
    plm = tiny_plm(family)
    cost = Cost.measure(plm)
    for prompts in ([[1]], [[1] * 40], [[1] * 40, [1] * 3, [1]], [[1] * 7] * 20):
        held = plm.open_session(prompts).held_bytes
        kept = cost.bytes(len(prompts), max(map(len, prompts)))
        assert held <= kept
        if family == "llama":
            assert kept <= 1.5 * held


def test_deleting_twice_and_deleting_anothers():
    async def run():
        sessions, _, evicted = registry()
        entry = add(sessions)
        await sessions.delete(entry.name, "b")
        assert not entry.session.closed
        await sessions.delete(entry.name, "a")
        await sessions.delete(entry.name, "a")
        assert (entry.session.closed, len(sessions), evicted) == (True, 0, [])

    asyncio.run(run())


def test_what_is_remembered_of_closed_sessions_is_bounded(monkeypatch):
    monkeypatch.setattr("pema.serving.sessions.REMEMBERED", 2)
    sessions, _, _ = registry()
    entries = [add(sessions) for _ in range(3)]
    sessions.close_all()
    codes = []
    for entry in entries:
        with pytest.raises(Refusal) as caught:
            sessions.find(entry.name, "a")
        codes.append(caught.value.status)
    assert codes == [404, 410, 410]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("add"), st.integers(1, 120)),
            st.tuples(st.just("grow"), st.integers(1, 30)),
            st.tuples(st.just("wait"), st.integers(1, 70)),
            st.tuples(st.just("delete"), st.integers(0, 9)),
        ),
        max_size=40,
    )
)
def test_whatever_happens_the_budget_holds_and_nothing_leaks(events):
    sessions, clock, _ = registry()
    made = []
    for what, n in events:
        if what == "add":
            with contextlib.suppress(Refusal), sessions.place("a"):
                made.append(FakeSession())
                sessions.add("a", made[-1], "float32", [1], n)
        elif what == "wait":
            clock.now += n
        elif what == "grow" and len(sessions):
            entry = next(iter(sessions._live.values()))
            sessions.stepped(entry, [1], entry.held + n, None, b"")
        elif what == "delete" and n < len(sessions):
            asyncio.run(sessions.delete(list(sessions._live)[n], "a"))
        assert sessions.held <= 100
        assert len(sessions) <= 3
        assert sum(not session.closed for session in made) == len(sessions)
