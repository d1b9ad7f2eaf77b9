"""Printed texts cannot control the terminal."""

import io
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.table import Table

from pema.console import LINE_SECONDS, keeping, note, print_table, printable, progress


def test_escape_codes_are_shown_and_not_obeyed():
    assert printable("a\x1b[2J\x07b\x9bc\r\n\td é \u4e2d") == "a\\x1b[2J\\x07b\\x9bc\\r\n\td é \u4e2d"


@given(st.text())
def test_printed_texts_contain_no_control_characters(text):
    shown = printable(text)
    assert all(char.isprintable() or char in "\n\t" for char in shown if char < "\xa0")
    shown.encode()
    if all(char.isprintable() or char in "\n\t" for char in text):
        assert shown == text


def test_notes_and_errors_are_printed_so(capsys, monkeypatch, tmp_path):
    import pema.cli

    note("a\x1b[2Jb")
    monkeypatch.setattr(sys, "argv", ["pema", "memory", "info", str(tmp_path / "\x1b[2J")])
    with pytest.raises(SystemExit):
        pema.cli.main()
    said = capsys.readouterr().err
    assert "\x1b" not in said
    assert said.count("\\x1b[2J") == 2


def test_a_table_in_a_file_is_complete_whatever_the_width(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    table = Table(title="title")
    cells = [f"a label of some length, number {i}" for i in range(9)]
    for _ in cells:
        table.add_column()
    table.add_row(*cells)
    print_table(table)
    lines = capsys.readouterr().out.splitlines()
    assert any(all(cell in line for cell in cells) for line in lines)


def test_what_is_kept_is_a_note_of_the_interruption_and_of_nothing_else():
    with pytest.raises(KeyboardInterrupt) as stop, keeping("all of it"):
        raise KeyboardInterrupt
    assert stop.value.__notes__ == ["all of it"]
    with pytest.raises(ValueError, match="wrong") as failure, keeping("all of it"):
        raise ValueError("wrong")
    assert not hasattr(failure.value, "__notes__")


@pytest.mark.parametrize(("name", "code"), [("SIGINT", 130), ("SIGTERM", 143)])
def test_an_interrupted_command_says_what_is_kept_in_one_line(capsys, monkeypatch, name, code):
    import signal

    import pema.cli

    def interrupted(**_):
        with keeping("five of nine are kept"):
            signal.raise_signal(signal.Signals[name])

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr("pema.cli.app.app", interrupted)
    monkeypatch.setattr(sys, "argv", ["pema"])
    with pytest.raises(SystemExit) as stop:
        pema.cli.main()
    assert stop.value.code == code
    word = {130: "interrupted", 143: "terminated"}[code]
    assert capsys.readouterr().err == f"pema: {word}; five of nine are kept.\n"
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_bar_that_moves_in_bursts_shows_the_average_rate_and_the_time_left(monkeypatch):
    from rich.console import Console
    from rich.progress import Progress

    now, bars = [0.0], []
    monkeypatch.setattr("pema.console.stderr", Console(file=io.StringIO(), force_terminal=True, width=120))
    init = Progress.__init__
    monkeypatch.setattr(
        Progress,
        "__init__",
        lambda self, *columns, **options: (
            bars.append(self),
            init(self, *columns, get_time=lambda: now[0], auto_refresh=False, **options),
        )[-1],
    )

    def line():
        written = Console(file=io.StringIO(), width=120)
        written.print(bars[0].make_tasks_table(bars[0].tasks))
        return " ".join(written.file.getvalue().split())

    with progress("building", 1000, "tokens") as advance:
        advance(400, earlier=True)
        assert "40%" in line()
        assert "tokens/s" not in line()
        assert "left -:--:--" in line()
        now[0] = 10.0
        for _ in range(100):  # the answers of a batch come at once
            advance(1)
        assert "50% 10 tokens/s 0:00:10 left 0:00:50" in line()
        now[0] = 20.0
        advance(500)
        now[0] = 99.0
        assert "100% 30 tokens/s 0:00:20 left 0:00:00" in line()


def test_a_bar_without_a_total_has_no_time_left(monkeypatch):
    from rich.console import Console

    monkeypatch.setattr("pema.console.stderr", Console(file=io.StringIO(), force_terminal=True, width=120))
    with progress("reading", None, "lines") as advance:
        advance(3)


def test_a_log_gets_a_line_now_and_then_and_no_bar(monkeypatch):
    from rich.console import Console
    from rich.progress import Progress

    now, log = [0.0], io.StringIO()
    monkeypatch.setattr("pema.console.stderr", Console(file=log, width=40))
    init = Progress.__init__
    monkeypatch.setattr(
        Progress, "__init__", lambda self, *columns, **options: init(self, *columns, get_time=lambda: now[0], **options)
    )
    with progress("building", 1000, "tokens") as advance:
        for second in range(1, 101):
            now[0] = float(second)
            advance(2, f"example {second}\x1b[2J")
    with progress("running", None, "runs") as advance:
        now[0] += LINE_SECONDS - 1
        advance(1)  # too early for a line
        now[0] += 1
        advance(1)
    assert log.getvalue().splitlines() == [
        "building: 60 of 1,000 (6%) tokens, 2 tokens/s, 0:07:50 left, example 30\\x1b[2J",
        "building: 120 of 1,000 (12%) tokens, 2 tokens/s, 0:07:20 left, example 60\\x1b[2J",
        "building: 180 of 1,000 (18%) tokens, 2 tokens/s, 0:06:50 left, example 90\\x1b[2J",
        "running: 2 runs, 0.067 runs/s",
    ]
