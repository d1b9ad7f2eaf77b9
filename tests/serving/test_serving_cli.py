"""`pema serve` and `pema serve-key` as far as they go without a server."""

import json
import signal
import sys
import tomllib

import pytest

from pema.cli import main
from pema.serving.keys import digest
from pema.serving.policy import Key, Policy


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Run `pema ...` in an empty folder; returns the exit code, stdout and stderr."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        monkeypatch.setattr("sys.argv", ["pema", *arguments])
        with pytest.raises(SystemExit) as stop:
            main()
        out, err = capsys.readouterr()
        return stop.value.code or 0, out, err

    return run


def test_a_key_is_shown_once_and_its_hash_goes_into_the_policy(run, tmp_path):
    code, out, err = run("serve-key", "acme")
    assert code == 0
    hint = " ".join(err.split())
    for rule in ("tokens_per_day = 5", 'head = "masked"', 'contexts = ["predicted"]'):
        assert rule.replace("5", "N") in hint
        assert rule.partition(" ")[0] in Key.model_fields
    key, lines = out.split("\n", 1)
    key = key.split()[-1]
    assert key.startswith("pema_")
    assert key not in lines
    policy = lines[lines.index("[[keys]]") :]
    assert tomllib.loads(policy)["keys"] == [{"name": "acme", "sha256": digest(key)}]
    (tmp_path / "policy.toml").write_text(policy, encoding="utf-8")
    assert Policy.read(tmp_path / "policy.toml").keys[0].name == "acme"
    code, out, _ = run("serve-key", "acme", "--json")
    made = json.loads(out)
    assert made["sha256"] == digest(made["key"])
    assert made["key"] != key


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--policy", "nowhere.toml"], "the policy nowhere.toml cannot be read"),
        (["--host", "0.0.0.0"], "0.0.0.0 can be reached from other machines"),
        (["--tls-cert", "cert.pem"], "--tls-cert and --tls-key go together"),
        (["--host", "203.0.113.1", "--insecure-network", "--port", "0"], "cannot listen on 203.0.113.1"),
    ],
)
def test_what_cannot_be_meant_is_bad_usage(run, arguments, message):
    code, _, err = run("serve", "embedded", *arguments)
    assert code == 2
    assert message in " ".join(err.split())


def test_a_secret_that_is_missing_is_said_before_the_address(run, tmp_path):
    key = f'[[keys]]\nname = "acme"\nsha256 = "{"a" * 64}"\nhead = "masked"\nmask_secret = "acme.kye"\n'
    (tmp_path / "policy.toml").write_text(key, encoding="utf-8")
    code, out, err = run("serve", "embedded", "--port", "0", "--policy", "policy.toml")
    assert (code, out) == (1, "")
    assert "the mask's secret acme.kye does not exist: check the path" in " ".join(err.split())


def test_a_plm_that_cannot_be_loaded_is_one_line_and_exit_code_1(run, tmp_path, monkeypatch):
    code, out, err = run("serve", str(tmp_path), "--port", "0")
    assert (code, out) == (1, "")
    assert "contains no config.json" in err

    (tmp_path / "config.json").write_text("{}", encoding="utf-8")
    monkeypatch.setattr("pema.serving.logs.log_to_stderr", lambda: None)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
    try:
        code, out, err = run("serve", str(tmp_path), "--port", "0")
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    assert code == 1
    assert out.startswith(f"serving {tmp_path} at http://127.0.0.1:")
    assert len(err.splitlines()) == 1
    assert err.startswith("pema: ")
    assert "Traceback" not in err


@pytest.mark.parametrize("package", ["fastapi", "uvicorn", "prometheus_client"])
def test_without_the_extra_it_says_how_to_install_it(run, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    code, _, err = run("serve", "embedded")
    assert code == 2
    assert f"needs the package {package}: pip install 'fastapi" in " ".join(err.split())
