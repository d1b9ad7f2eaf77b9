"""The image of the server, as far as it can be checked without building it."""

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from served import listening
from test_serving_process import PEMA, serving

from pema.serving.health import PATH, PORT, healthy
from pema.serving.operations_api import router

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def instructions():
    """The instructions of the Dockerfile, in order."""
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    joined = re.sub(r" *\\\n *", " ", "\n".join(lines))
    return [tuple(line.split(" ", 1)) for line in joined.splitlines() if line]


def last(instructions, name):
    return [value for instruction, value in instructions if instruction == name][-1]


def test_only_known_instructions(instructions):
    known = "FROM WORKDIR COPY RUN ARG ENV USER VOLUME EXPOSE HEALTHCHECK ENTRYPOINT CMD"
    assert {name for name, _ in instructions} <= set(known.split())
    bases = {value.split()[0] for name, value in instructions if name == "FROM"}
    assert bases == {"python:3.12-slim"}
    assert "Python :: 3.12" in (ROOT / "pyproject.toml").read_text(encoding="utf-8")


def test_it_runs_as_a_user_without_rights_who_exists(instructions):
    user = last(instructions, "USER")
    names = [name for name, _ in instructions]
    assert user not in ("root", "0")
    assert f" {user}" in last(instructions, "RUN")
    assert re.search(rf"useradd --system .* {user} ", last(instructions, "RUN") + " ")
    assert "RUN" not in names[names.index("USER") :]


def test_the_command_has_the_options_of_pema_serve(instructions):
    assert json.loads(last(instructions, "ENTRYPOINT")) == ["pema", "serve"]
    command = json.loads(last(instructions, "CMD"))
    shown = subprocess.run([*PEMA, "serve", "--help"], capture_output=True, text=True, check=True).stdout
    options = [word for word in command if word.startswith("--")]
    assert options
    assert all(re.search(rf"(?<![\w-]){option}(?![\w-])", shown) for option in options)
    port = command[command.index("--port") + 1]
    assert last(instructions, "EXPOSE") == port
    assert int(port) == PORT


def test_the_health_check_is_one_of_the_server(instructions):
    options, _, check = last(instructions, "HEALTHCHECK").partition(" CMD ")
    assert "--interval" in options
    assert json.loads(check) == ["python", "-m", "pema.serving.health"]
    assert PATH in {route.path for route in router.routes}


def test_torch_is_as_the_package_wants_it(instructions):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    (torch,) = [each for each in project["dependencies"] if each.startswith("torch")]
    assert f"'{torch}'" in last(instructions, "RUN")
    assert "serve" in project["optional-dependencies"]
    assert "[serve]" in last(instructions, "RUN")


def test_the_constraints_are_the_locked_versions(tmp_path, instructions):
    (command,) = re.findall(r"sed (?:-e '[^']*' ?)+", last(instructions, "RUN"))
    locked = ROOT / "requirements" / "locked.txt"
    done = subprocess.run(f"{command} {locked}", shell=True, capture_output=True, text=True, check=True)
    lines = [line for line in done.stdout.splitlines() if line and not line.startswith("#")]
    assert len(lines) == len(re.findall(r"(?m)^[\w.-]+==", locked.read_text(encoding="utf-8")))
    assert all(re.fullmatch(r"[\w.-]+==[\w.+!]+( ;.*[^\\])?", line) for line in lines)


def test_nothing_but_the_sources_goes_into_the_image(instructions):
    lines = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    rules = [line for line in lines if not line.startswith("#")]
    assert rules[0] == "*"
    allowed = {line[1:] for line in rules if line.startswith("!")}
    copied = set()
    for value in (value for name, value in instructions if name == "COPY"):
        if not value.startswith("--from"):
            copied |= set(value.split()[:-1])
    assert allowed == copied
    assert all((ROOT / name).exists() for name in copied)
    assert not re.search(r"(?i)secret|password|api_key|token=", (ROOT / "Dockerfile").read_text(encoding="utf-8"))


def test_health_over_http_and_tls_and_nothing_in_the_log(plm, folder, certificate, caplog):
    cert, private = certificate
    with listening(plm) as (url, app):
        port = int(url.rpartition(":")[2])
        assert healthy(port)
        assert not [record for record in caplog.records if record.levelname != "INFO"]
        app.state.lifecycle.failure = RuntimeError()
        assert not healthy(port)
        app.state.lifecycle.failure = None
    assert not healthy(port)
    with serving(folder, "", "--tls-cert", cert, "--tls-key", private) as (_, url, log):
        command = [sys.executable, "-m", "pema.serving.health", url.rpartition(":")[2]]
        assert subprocess.run(command, check=False).returncode == 0
        assert not log.read_text(encoding="utf-8")
    assert subprocess.run(command, check=False).returncode == 1
