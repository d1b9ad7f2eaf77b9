"""The attacks: each has its figures, everything holds, and requests are bounded."""

import sys

import pytest

from reproduction.attack import __main__ as command
from reproduction.attack import client, server, workers
from reproduction.lines import read_runs
from reproduction.paths import ROOT
from reproduction.tables.attack import AFTER, BEFORE, FILE

NAMES = {*server.ATTACKS, *workers.ATTACKS, *client.ATTACKS, *command.FILES}


def test_every_attack_has_its_figures_and_nothing_falls():
    runs = read_runs(FILE)
    assert set(runs) == {BEFORE, AFTER}
    after = runs[AFTER]["results"]
    assert set(after) == NAMES
    assert all(one["held"] > 0 and one["fell"] == 0 and one["figures"] for one in after.values())
    # An attack that never made anything fall shows nothing.
    before = runs[BEFORE]["results"]
    assert sum(one["fell"] > 0 for one in before.values()) >= 10


def test_what_is_sent_is_bounded():
    assert all(len(body) <= server.MIB for body in server.BODIES.values())


def test_the_files_that_are_attacked_have_tests():
    assert all((ROOT / file).is_file() for files in command.FILES.values() for file in files)


def test_tests_are_counted_as_what_held_and_what_fell(tmp_path):
    (tmp_path / "src").mkdir()
    (tmp_path / "test_x.py").write_text(
        "import pytest\ndef test_a(): pass\ndef test_b(): assert 0\n@pytest.mark.skip\ndef test_c(): pass\n",
        encoding="utf-8",
    )
    found = command.tested(tmp_path, ["test_x.py"])
    assert found == {"held": 1, "fell": 1, "figures": "2 tests, 1 failed"}


@pytest.mark.slow
def test_an_attack_of_this_checkout_holds(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["attack", "--only", "DNS rebinding, and scripts from elsewhere"])
    with pytest.raises(SystemExit) as ended:
        command.main()
    assert ended.value.code == 0
    assert "| DNS rebinding, and scripts from elsewhere | 3 | 0 |" in capsys.readouterr().out
