"""What a process elsewhere tells is printed here as if it had happened here."""

import pytest

from pema import console, relay
from pema.console import note, progress
from pema.relay import Relay, Repeater


@pytest.fixture
def told(monkeypatch):
    """The messages of a relay, which this process tells what it would print."""
    messages = []
    monkeypatch.setattr(console, "_listener", None)
    console.redirect(Relay(messages.append))
    return messages


def work():
    note("a note")
    with progress("counting", 30, "pairs") as advance:
        advance(10, earlier=True)
        for k in range(20):
            advance(1, f"step {k}")
    note("the end")


def test_nothing_is_printed_and_everything_is_told_in_order(told, capsys, monkeypatch):
    monkeypatch.setattr(relay, "SECONDS", 3600.0)
    work()
    assert capsys.readouterr() == ("", "")
    assert told == [
        [("note", "a note")],
        [("begin", "counting", 30, "pairs")],
        [("advance", 10.0, "", True), ("advance", 20.0, "step 19", False), ("end",)],
        [("note", "the end")],
    ]


def test_progress_is_told_at_most_a_few_times_a_second(told, monkeypatch):
    seconds = iter([0.1 * k for k in range(1000)])
    monkeypatch.setattr(relay.time, "monotonic", lambda: next(seconds))
    work()
    advances = [event for message in told for event in message if event[0] == "advance"]
    assert sum(n for _, n, *_ in advances) == 30
    assert len(advances) < 15


def test_it_is_printed_where_it_is_heard(told, capsys, monkeypatch):
    work()
    monkeypatch.setattr(console, "_listener", None)
    monkeypatch.setattr(console, "LINE_SECONDS", 0.0)
    with Repeater() as repeat:
        for message in told:
            repeat(message)
    heard = capsys.readouterr().err
    work()
    printed = capsys.readouterr().err
    assert heard.splitlines()[0] == printed.splitlines()[0] == "a note"
    assert heard.splitlines()[-1] == printed.splitlines()[-1] == "the end"
    last = [text.splitlines()[-2].partition(",")[0] for text in (heard, printed)]
    assert last == ["counting: 30 of 30 (100%) pairs"] * 2


def test_bars_of_a_process_that_ended_are_closed(capsys, monkeypatch):
    closed = []

    class Bar:
        def __enter__(self):
            return lambda *_, **__: None

        def __exit__(self, *_):
            closed.append(True)

    monkeypatch.setattr(console, "progress", lambda *_: Bar())
    with Repeater() as repeat:
        repeat([("begin", "a", 1, "pairs"), ("begin", "b", 1, "pairs")])
        assert closed == []
    assert closed == [True, True]
