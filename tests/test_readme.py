"""The README's commands run, and its figures are those of the committed results."""

import re
import shlex
from pathlib import Path

import pytest
from recipes import tables

from pema.cli import main
from pema.experiments.demo import support_data

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with the files that the README names, of a few sentences each."""
    data = support_data()
    for name, examples in (("train", data.train[:24]), ("test", data.test[:3])):
        (tmp_path / f"{name}.en").write_text("".join(f"{e.source}\n" for e in examples), encoding="utf-8")
        (tmp_path / f"{name}.de").write_text("".join(f"{e.target}\n" for e in examples), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_commands_run(here, monkeypatch, capsys):
    lines = [line for block in blocks("sh") for line in block.splitlines() if line.startswith("pema ")]
    verbs = {line.split()[1] for line in lines}
    assert verbs == {"build", "memory", "train", "generate", "evaluate", "release"}
    for line in lines:
        monkeypatch.setattr("sys.argv", shlex.split(line))
        with pytest.raises(SystemExit) as stop:
            main()
        assert not stop.value.code, f"{line}\n{capsys.readouterr().err}"
    assert len((here / "out.de").read_text(encoding="utf-8").splitlines()) == 3


def test_the_python_runs(here):
    code = "\n".join(blocks("python"))
    assert len(blocks("python")[0].strip().splitlines()) <= 12
    values: dict[str, object] = {}
    exec(compile(code, "README.md", "exec"), values)
    assert isinstance(values["texts"], list)
    assert len(values["texts"]) == 1


def test_the_two_commands_are_targets_of_make():
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    commands = [line.split()[1] for block in blocks("sh") for line in block.splitlines() if line.startswith("make ")]
    assert commands == ["demo", "test"]
    assert set(commands) <= targets


@pytest.mark.parametrize("page", tables.BLOCKS, ids=lambda page: page.name)
def test_the_figures_are_those_of_the_results(page):
    assert tables.parts_of(page)[1] == tables.BLOCKS[page](), "run python -m recipes.tables"


def test_links_lead_somewhere():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        if not target.startswith("http"):
            assert (ROOT / target).exists(), target
