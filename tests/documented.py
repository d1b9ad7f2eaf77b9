"""Blocks of code in README and docs, and what runs each of them.

A page's blocks run in their order in one folder. Its languages:

- `sh`: `pema` runs in the process, except for `pema serve`, which runs beside it until the page ends; what installs,
  measures for hours or needs other machines is checked by its names only.
- `python`: runs, with the names of the blocks before it. A first comment with a file's name writes that file as well.
- `toml` and `json`: parsed; a first comment with a file's name writes that file.
- `text`, or no language: is shown, not run.
"""

import importlib.util
import json
import re
import shlex
import subprocess
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path

import pytest
from accelerate.commands.launch import launch_command_parser

import pema
from pema.cli import main
from pema.cli.app import PARALLEL
from pema.experiments.config import read_config
from pema.serving.keys import digest
from reproduction import folders

ROOT = Path(__file__).parent.parent
LOCAL, REMOTE = "http://127.0.0.1:8000", "https://plm.example"
KEY = "pema_key_of_the_documentation"
NAME = re.compile(r"# (\S+\.\w+)\n")
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
INSTALLED = re.compile(rf"(?:\.|dist/pema-{re.escape(pema.__version__)}-py3-none-any\.whl)(?:\[([\w,-]+)\])?")
"""This package in a command of pip, with its extras."""
WRITES = re.compile(r"(?m)^sha256 = \"[0-9a-f.]+\"")


@dataclass(frozen=True)
class Block:
    """A block of code.

    Attributes:
        language: the first word after the fence; "" if there is none.
        text: the code.
        line: number of its first line in the page.
    """

    language: str
    text: str
    line: int


def blocks(page: Path) -> list[Block]:
    """Return the blocks of a page."""
    text = page.read_text(encoding="utf-8")
    found = re.finditer(r"^```(\w*)[^\n]*\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    return [Block(m[1], m[2], text[: m.start(2)].count("\n") + 1) for m in found]


def pages() -> list[Path]:
    """Return README and the pages of the site."""
    return [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]


class Reader:
    """Reader of a page who does what it says, with small data and the PLM that is bundled for tests."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self.monkeypatch, self.capsys = monkeypatch, capsys
        self.names: dict[str, object] = {"__name__": "__main__"}
        self.servers: list[subprocess.Popen[str]] = []
        self.address = ""

    def follow(self, page: Path) -> None:
        """Run all blocks of a page."""
        languages = {"": self.text, "text": self.text, "json": self.json, "toml": self.toml}
        languages |= {"python": self.python, "sh": self.sh}
        for block in blocks(page):
            try:
                languages[block.language](self._at_hand(block.text))
            except BaseException as error:
                error.add_note(f"{page.relative_to(ROOT)}:{block.line}")
                raise

    def close(self) -> None:
        """End the servers."""
        for server in self.servers:
            server.terminate()
            assert server.wait(60) == 0
            server.stdout.close()

    def text(self, text: str) -> None:
        """Leave what is only shown."""

    def json(self, text: str) -> None:
        """Parse each line, or the whole."""
        try:
            json.loads(text)
        except ValueError:
            for line in text.splitlines():
                json.loads(line)

    def toml(self, text: str) -> None:
        """Parse a file, and write it where it has a name."""
        tomllib.loads(text)
        name = NAME.match(text)
        if name:
            Path(name[1]).write_text(WRITES.sub(f'sha256 = "{digest(KEY)}"', text), encoding="utf-8")

    def python(self, text: str) -> None:
        """Run the code."""
        name = NAME.match(text)
        if name:
            Path(name[1]).write_text(text, encoding="utf-8")
            importlib.invalidate_caches()
        exec(compile(text, "a page", "exec"), self.names)

    def sh(self, text: str) -> None:
        """Run the commands."""
        for line in text.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words:
                self._command(words)

    def _command(self, words: list[str]) -> None:
        match words:
            case ["export", assignment]:
                self.monkeypatch.setenv(assignment.partition("=")[0], KEY)
            case ["pema", "serve", *rest]:
                self._serve(rest)
            case ["pema", "compare" | "sweep" as verb, file, *_] if file.startswith("reproduction/"):
                read_config(ROOT / file, verb, ROOT)
            case ["pema", *rest]:
                self._pema(rest)
            case ["accelerate", "launch", *rest]:
                launch = launch_command_parser().parse_args(rest)
                assert (launch.module, launch.training_script) == (True, "pema"), rest
                assert launch.training_script_args[0] in PARALLEL, rest
            case ["make", target, *_]:
                assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE), target
            case ["pip", "install", *wanted]:
                for word in wanted:
                    given = INSTALLED.fullmatch(word)
                    assert given or "pema" not in word, f"{word} is another project on the package index"
                    assert given is None or set(filter(None, (given[1] or "").split(","))) <= EXTRAS.keys(), word
            case ["python", "-m", "reproduction.folders", "unpack", *rest]:
                self.monkeypatch.setattr("sys.argv", ["folders", "unpack", *rest])
                folders.main()
            case ["python", "-m", module, *_]:
                assert importlib.util.find_spec(module), module
            case _:
                raise AssertionError(f"what does this do: {shlex.join(words)}")

    def _pema(self, words: list[str]) -> None:
        if {LOCAL, REMOTE} & set(words) and not self.servers:
            self._serve(["embedded", "--policy", "policy.toml"])
        words = [self.address if word in (LOCAL, REMOTE) else word for word in words]
        self.monkeypatch.setattr("sys.argv", ["pema", *words])
        with pytest.raises(SystemExit) as stop:
            main()
        assert not stop.value.code, f"{shlex.join(words)}\n{self.capsys.readouterr().err}"

    def _serve(self, words: list[str]) -> None:
        command = [sys.executable, "-m", "pema", "serve", *words, "--port", "0"]
        self.servers.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
        self.address = self.servers[-1].stdout.readline().split()[-1]
        self.monkeypatch.setenv("PEMA_API_KEY", KEY)

    @staticmethod
    def _at_hand(text: str) -> str:
        return text.replace("smollm2-135m", "embedded").replace("s3://", "memory://")
