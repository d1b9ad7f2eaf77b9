"""The README's commands run and its links lead somewhere."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from pema.cli import main
from pema.experiments.data import support_data
from pema.serving.keys import digest, new_key

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
    assert verbs == {"build", "memory", "train", "generate", "inspect", "evaluate", "release"}
    for line in lines:
        monkeypatch.setattr("sys.argv", shlex.split(line))
        with pytest.raises(SystemExit) as stop:
            main()
        assert not stop.value.code, f"{line}\n{capsys.readouterr().err}"
    assert len((here / "out.de").read_text(encoding="utf-8").splitlines()) == 3


def test_the_comparison_runs(here, monkeypatch, capsys):
    for side in ("en", "de"):
        lines = (here / f"train.{side}").read_text(encoding="utf-8").splitlines(keepends=True)
        (here / f"dev.{side}").write_text("".join(lines[-2:]), encoding="utf-8")
        (here / f"train.{side}").write_text("".join(lines[:-2]), encoding="utf-8")
    (config,) = blocks("toml")
    (here / "methods.toml").write_text(config, encoding="utf-8")
    for line in blocks("sh compare")[0].splitlines():
        monkeypatch.setattr("sys.argv", shlex.split(line))
        with pytest.raises(SystemExit) as stop:
            main()
        assert not stop.value.code, f"{line}\n{capsys.readouterr().err}"
    page = (here / "results.html").read_text(encoding="utf-8")
    assert all(label in page for label in ("PLM alone", "kNN-LM", "LoRA", "PEMA"))


def test_the_two_parties_commands_run(here, monkeypatch, capsys):
    """Owner and customer as the README has them: the server a process of its own, under a policy with one key."""
    (serve,) = [line for line in blocks("sh owner")[0].splitlines() if line.startswith("pema serve ")]
    key = new_key()
    (here / "policy.toml").write_text(f'[[keys]]\nname = "acme"\nsha256 = "{digest(key)}"\n', encoding="utf-8")
    monkeypatch.setenv("PEMA_API_KEY", key)
    command = [sys.executable, "-c", "from pema.cli import main; main()", *shlex.split(serve)[1:], "--port", "0"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        url = server.stdout.readline().split()[-1]
        lines = [line.replace("http://127.0.0.1:8000", url) for line in blocks("sh customer")[0].splitlines()]
        # Private training takes 128 examples a step; the audit wants others that were not trained on, in the same mode.
        data = support_data().train
        for name, examples in (("train", data[:130]), ("o", data[130:170])):
            (here / f"{name}.en").write_text("".join(f"{e.source}\n" for e in examples), encoding="utf-8")
            (here / f"{name}.de").write_text("".join(f"{e.target}\n" for e in examples), encoding="utf-8")
        lines.insert(0, lines[0].replace("train.", "o.").replace("-o private", "-o others"))
        for line in lines:
            monkeypatch.setattr("sys.argv", shlex.split(line))
            with pytest.raises(SystemExit) as stop:
                main()
            assert not stop.value.code, f"{line}\n{capsys.readouterr().err}"
    finally:
        server.terminate()
        assert server.wait(60) == 0
        server.stdout.close()
    assert len((here / "far.de").read_text(encoding="utf-8").splitlines()) == 3


def test_the_python_runs(here):
    code = "\n".join(blocks("python"))
    assert len(blocks("python")[0].replace("\n\n", "\n").strip().splitlines()) <= 6
    values: dict[str, object] = {}
    exec(compile(code, "README.md", "exec"), values)
    assert isinstance(values["texts"], list)
    assert len(values["texts"]) == 1


def test_the_two_commands_are_targets_of_make():
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    commands = [line.split()[1] for block in blocks("sh") for line in block.splitlines() if line.startswith("make ")]
    assert commands == ["demo", "test"]
    assert set(commands) <= targets


def test_links_lead_somewhere():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        if not target.startswith("http"):
            assert (ROOT / target).exists(), target
