"""`pema train --dp-epsilon` and `pema audit`, as a user calls them."""

import json
import re
import sys

import pytest

from pema.cli import main
from pema.memory.build import build_memory
from pema.tasks.example import Example
from pema.tasks.registry import get_task

WORDS = ("house", "dog", "day", "small", "here", "that", "where", "is")


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_plm):
    """Memories of two halves of one set, and one of another PLM."""
    folder, task = tmp_path_factory.mktemp("audit-cli"), get_task("translation")
    examples = [Example(f"the {a} {b}", f"das {b} {a}") for a in WORDS[:5] for b in WORDS[5:]] * 2
    for name, part, seed in (("members", examples[::2], 0), ("others", examples[1::2], 0), ("foreign", examples, 1)):
        build_memory(tiny_plm("llama", seed=seed), part, task, folder / name)
    return folder


@pytest.fixture
def run(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["pema", *map(str, arguments)])
        code = 0
        try:
            main()
        except SystemExit as stop:
            code = stop.code or 0
        out, err = capsys.readouterr()
        return code, out, " ".join(err.split())

    return run


@pytest.fixture
def private(run, folder):
    """A private adapter, trained once."""
    if not (folder / "private").exists():
        budget = ("--dp-epsilon", 8, "--dp-delta", 0.01, "--batch-size", 8, "--epochs", 2, "--rank", 4)
        code, out, err = run("train", "members", "-o", "private", *budget, "--json")
        assert code == 0, err
        figures = json.loads(out)
        assert figures["epsilon"] <= 8
        assert (figures["delta"], figures["unit"], figures["clip_norm"]) == (0.01, "example", 1.0)
    return folder / "private"


def test_private_training_tells_what_it_spent(run, private):
    assert not (private / "schedule.json").exists()
    budget = ("--dp-epsilon", 8, "--dp-delta", 0.01, "--batch-size", 8, "--epochs", 2, "--rank", 4)
    code, out, _ = run("train", "members", "-o", "private", *budget, "--resume")
    assert code == 0
    assert re.search(r"epsilon +7\.\d+", out)
    assert "noise multiplier" in out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--dp-epsilon", 8), "--dp-epsilon 8.0 with --dp-delta none: differential privacy needs both"),
        (("--dp-delta", 0.01), "--dp-epsilon none with --dp-delta 0.01"),
        (("--dp-epsilon", 8, "--dp-delta", 0.9), "--dp-delta 0.9 for 15 examples"),
        (("--dp-epsilon", 8, "--dp-delta", 0.01, "--preset", "paper"), "Use --kappa 0.0"),
        (("--dp-epsilon", 8, "--dp-delta", 0.01, "--vocabulary", "seen"), "Use --vocabulary full"),
        (("--dp-epsilon", 8, "--dp-delta", 0.01, "--clip", 0), "Use --clip 1"),
        (("--dp-epsilon", 8, "--dp-delta", 0.01), "use at most 15"),
    ],
)
def test_what_cannot_be_private_is_bad_usage(run, folder, arguments, words):
    code, _, err = run("train", "members", "-o", "never", *arguments)
    assert code == 2
    assert words in err
    assert not (folder / "never").exists()


def test_an_audit_for_a_person_and_for_a_program(run, private):
    arguments = ("audit", "private", "--members", "members", "--non-members", "others", "--references", 2)
    code, out, err = run(*arguments)
    assert code == 0, err
    for line in ("loss attack", "plm attack", "references attack", "largest AUC that the guarantee allows"):
        assert line in out
    code, out, _ = run(*arguments[:-1], 0, "--json")
    assert code == 0
    assert set(json.loads(out)["attacks"]) == {"loss", "plm"}


def test_memories_of_another_plm_are_refused(run, private):
    code, _, err = run("audit", "private", "--members", "foreign", "--non-members", "others")
    assert code == 1
    assert "another PLM" in err


def test_audit_help_has_an_example(run):
    code, out, _ = run("audit", "--help")
    assert code == 0
    assert "Example: pema audit adapter" in " ".join(re.sub(r"[│╭╮╰╯─]", " ", out).split())
