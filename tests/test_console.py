"""What is printed cannot command the terminal."""

import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pema.console import note, printable


def test_escape_codes_are_shown_and_not_obeyed():
    assert printable("a\x1b[2J\x07b\x9bc\r\n\td é \u4e2d") == "a\\x1b[2J\\x07b\\x9bc\\r\n\td é \u4e2d"


@given(st.text())
def test_what_is_printed_holds_no_control_characters(text):
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
