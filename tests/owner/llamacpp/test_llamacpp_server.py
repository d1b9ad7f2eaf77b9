"""llama.cpp's own server from end to end, on a tiny model with random weights: started, running, killed."""

import gc
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tests.test_lifeline import is_running, wait_until

import pema
from pema.cli import main
from pema.errors import DataError, MismatchError, OwnerError
from pema.owner.client.connection import KEY, Connection
from pema.owner.llamacpp import process
from pema.owner.llamacpp.plm import LlamaCppPLM
from pema.owner.llamacpp.process import Settings, start
from pema.owner.local import LocalPLM
from pema.owner.opening import open_plm
from pema.owner.sources.served import Served

pytest.importorskip("xllamacpp")

NEAR = {"rtol": 2e-2, "atol": 2e-2}
"""The engine keeps keys and values in float16."""


@pytest.fixture(scope="module")
def plm(files):
    return open_plm(f"llamacpp:{files['F32']}")


@pytest.fixture(scope="module")
def loaded(files):
    return LocalPLM.load(files["F32"])


def ordered(parts):
    return sorted(parts, key=lambda part: part.index)


def test_its_representations_are_those_of_transformers(plm, loaded, texts):
    assert plm.deviation < 1e-3
    for a, b in zip(ordered(plm.represent(texts, [2, 3, 1])), ordered(loaded.represent(texts, [2, 3, 1])), strict=True):
        torch.testing.assert_close(a.representations, b.representations, **NEAR)
    for a, b in zip(ordered(plm.predict(texts, [6, 1, 9])), ordered(loaded.predict(texts, [6, 1, 9])), strict=True):
        assert a.generated.tolist() == b.generated.tolist()
        torch.testing.assert_close(a.representations, b.representations, **NEAR)


@pytest.mark.parametrize(("tokens", "slots"), [(process.TOKENS, process.SLOTS), (128, 4)])
def test_its_sessions_are_those_of_transformers(files, loaded, texts, tokens, slots):
    """Also with more rows than slots, and more tokens than the engine's memory holds."""
    server = start(Settings(str(files["F32"]), tokens, 64, 1, slots))
    plm = LlamaCppPLM(Served("tiny", files["F32"], server.url), Connection(server.url, key=server.key))
    prompts = [(text * 8)[:k] for text in texts for k in (25, 26, 40)]
    assert len(prompts) > 4
    assert sum(map(len, prompts)) > 128
    ours, theirs = plm.open_session(prompts), loaded.open_session(prompts)
    steps = [
        (list(range(5, 14)), None),
        ([20, 21, 22], [8, 0, 0]),
        ([30, 31, 32, 33], [2, 1, 1, 0]),
        ([40, 41, 42, 43], None),
    ]
    for chosen, parents in steps:
        ours.advance(chosen, parents)
        theirs.advance(chosen, parents)
        torch.testing.assert_close(ours.representations, theirs.representations, **NEAR)
    server.stop()


def test_builds_and_sessions_may_alternate(plm, loaded, texts):
    session, expected = plm.open_session(texts), loaded.open_session(texts)
    for step in range(3):
        list(plm.represent(texts, [2, 2, 2]))
        list(plm.predict(texts[::-1], [3, 3, 3]))
        session.advance([5 + step] * 3)
        expected.advance([5 + step] * 3)
        torch.testing.assert_close(session.representations, expected.representations, **NEAR)


def test_an_answer_does_not_depend_on_what_was_asked_before(plm, texts):
    first = ordered(plm.represent(texts, [2, 2, 2]))
    plm.open_session(texts).advance([5, 6, 7])
    again = ordered(plm.represent(texts[::-1], [2, 2, 2]))[::-1]
    assert all(torch.equal(a.representations, b.representations) for a, b in zip(first, again, strict=True))


def test_a_quantised_file(files, texts):
    plm, loaded = open_plm(f"llamacpp:{files['Q8_0']}"), LocalPLM.load(files["Q8_0"], dtype="float32")
    assert 1e-4 < plm.deviation < 0.05
    (a,), (b,) = plm.represent(texts[:1], [1]), loaded.represent(texts[:1], [1])
    difference = (a.representations - b.representations).norm(dim=1) / b.representations.norm(dim=1)
    assert difference.max() < 0.05
    assert plm.description.weights == "GGUF quantised to Q8_0, run by llama.cpp"


def run(monkeypatch, *arguments):
    monkeypatch.setattr("sys.argv", ["pema", *map(str, arguments)])
    try:
        main()
    except SystemExit as stop:
        return stop.code or 0
    return 0


def test_build_train_and_generate_from_the_command_line(files, tmp_path, monkeypatch, capsys):
    lines = [{"source": text, "target": text[::-1]} for text in ("abc", "dog", "cat", "house")]
    data = tmp_path / "train.jsonl"
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    plm = f"llamacpp:{files['Q8_0']}"
    template = ("--template", "{source} =", "--no-chat")
    assert not run(
        monkeypatch, "build", "--plm", plm, "--data", data, *("--task", "reply"), *template, "-o", tmp_path / "memory"
    )
    assert not run(monkeypatch, "train", tmp_path / "memory", "-o", tmp_path / "adapter", "--epochs", "2")
    output = tmp_path / "out.jsonl"
    assert not run(
        monkeypatch,
        *("generate", tmp_path / "adapter", "--plm", plm, "--data", data, "-o", output, "--max-new-tokens", "5"),
    )
    texts = [json.loads(line) for line in output.read_text().splitlines()]
    assert len(texts) == len(lines)
    assert "head(f) differs from the engine's own log-probabilities" in capsys.readouterr().err
    # The same in Python gives the same.
    adapter = pema.Adapter.from_pretrained(tmp_path / "adapter")
    again = pema.generate(open_plm(plm), adapter, [line["source"] for line in lines], max_new_tokens=5)
    assert again == [text["text"] for text in texts]


@pytest.fixture(scope="module")
def running(files):
    server = start(Settings.of(files["F32"], 128, 320))
    yield server
    server.stop()


def test_a_running_server(running, files, loaded, texts, monkeypatch):
    name = f"llamacpp+{running.url}#{files['F32']}"
    monkeypatch.delenv(KEY, raising=False)
    with pytest.raises(OwnerError, match=f"the server refused with 401.*Set {KEY}"):
        open_plm(name)
    monkeypatch.setenv(KEY, running.key)
    plm = open_plm(name)
    assert plm.description == open_plm(f"llamacpp:{files['F32']}").description
    (a,), (b,) = plm.represent(texts[:1], [2]), loaded.represent(texts[:1], [2])
    torch.testing.assert_close(a.representations, b.representations, **NEAR)
    with pytest.raises(MismatchError, match=r"runs another model than tiny\.Q8_0: [\d,]+ bytes of weights, expected"):
        open_plm(f"llamacpp+{running.url}#{files['Q8_0']}")


def test_sequences_beyond_the_batch_of_the_server(files, loaded, texts, capsys):
    server = start(Settings(str(files["F32"]), tokens=128, batch=40, threads=1))
    try:
        plm = LlamaCppPLM(Served("tiny", files["F32"], server.url), Connection(server.url, key=server.key))
        long = [*texts[0], *texts[1][1:]] * 5
        (a,), (b,) = plm.represent([long], [30]), loaded.represent([long], [30])
        torch.testing.assert_close(a.representations, b.representations, **NEAR)
        assert "longer sequences are read token by token" in capsys.readouterr().err
    finally:
        server.stop()


def test_the_context_ends_where_the_model_s_does(plm, loaded):
    full = ([5, 6, 7, 8] * 32)[:127]
    with pytest.raises(DataError, match="the PLM's context window holds 127"):
        plm.open_session([full])
    session, expected = plm.open_session([full[:-1]]), loaded.open_session([full[:-1]])
    session.advance([9])
    expected.advance([9])
    torch.testing.assert_close(session.representations, expected.representations, **NEAR)
    with pytest.raises(DataError, match="fills the PLM's context window"):
        session.advance([9])
    (a,), (b,) = plm.predict([full[:120]], [7]), loaded.predict([full[:120]], [7])
    assert a.generated.tolist() == b.generated.tolist()


def children(of):
    """Numbers of the processes whose parent is `of`."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            state = (folder / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(state[1]) == of:
            found.append(int(folder.name))
    return found


HOLD = """
import sys, threading
from pema.owner.opening import open_plm
made = []
thread = threading.Thread(target=lambda: made.append(open_plm("llamacpp:" + sys.argv[1])))
thread.start()
thread.join()  # the server outlives the thread that started it
made[0].open_session([[5, 6]])
print("ready", flush=True)
{work}
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    ("work", "number"),
    [
        ("threading.Event().wait()", signal.SIGKILL),
        ("threading.Event().wait()", signal.SIGTERM),
        ("threading.Event().wait()", signal.SIGINT),
        ("sys.stdin.read()", None),
        ("sys.stdin.read(); raise ZeroDivisionError", None),
    ],
    ids=["SIGKILL", "SIGTERM", "SIGINT", "end", "exception"],
)
def test_no_server_outlives_its_process(files, work, number):
    parent = subprocess.Popen(
        [sys.executable, "-c", HOLD.format(work=work), str(files["F32"])],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    try:
        assert parent.stdout.readline() == "ready\n"
        servers = children(parent.pid)
        assert len(servers) == 1
        if number is None:
            parent.stdin.close()
        else:
            parent.send_signal(number)
        parent.wait(30)
        assert wait_until(lambda: not any(map(is_running, servers)))
    finally:
        parent.kill()
        parent.wait(30)
        parent.stdin.close()
        parent.stdout.close()


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_plm_that_is_no_longer_used_ends_its_server(files):
    before = set(children(os.getpid()))
    plm = open_plm(f"llamacpp:{files['F32']}")
    (server,) = set(children(os.getpid())) - before
    del plm
    gc.collect()
    assert wait_until(lambda: not is_running(server))


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_server_that_was_killed_is_named(files):
    before = set(children(os.getpid()))
    plm = open_plm(f"llamacpp:{files['F32']}")
    (server,) = set(children(os.getpid())) - before
    session = plm.open_session([[5, 6]])
    os.kill(server, signal.SIGKILL)
    with pytest.raises(OwnerError, match=r"the server of llama\.cpp was killed by signal 9: check that there"):
        session.advance([7])


def test_a_file_that_llama_cpp_cannot_run(files, tmp_path):
    damaged = tmp_path / "damaged.gguf"
    damaged.write_bytes(files["Q8_0"].read_bytes()[:-5000])
    with pytest.raises(OwnerError, match=r"llama\.cpp cannot run .*damaged\.gguf: .+\."):
        start(Settings.of(damaged, 128, 320))


def test_the_key_of_a_started_server_is_in_no_list_of_processes(plm):
    keys = [plm._engine.connection._client.headers["Authorization"].split()[1]]
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            line = (folder / "cmdline").read_bytes()
        except OSError:
            continue
        assert not any(key.encode() in line for key in keys)


def test_a_missing_package_is_named(files, monkeypatch):
    monkeypatch.setattr(process, "find_spec", lambda name: None)
    with pytest.raises(OwnerError, match=r"llama\.cpp's server is not installed: "):
        start(Settings.of(files["F32"], 128, 320))
