"""llama.cpp's own server as an API that returns log-probabilities, from end to end, on a tiny model."""

import json
import subprocess
import sys

import pytest
import torch

import pema
from gguf_files import build_llama, write_gguf
from pema.cli import main
from pema.owner.client.connection import KEY
from pema.owner.llamacpp.process import Settings, start
from pema.owner.local import LocalPLM
from pema.owner.opening import open_plm
from tiny import build_tokenizer

pytest.importorskip("xllamacpp")
pytest.importorskip("gguf")

QUERIES = int(1.1 * 32) + 24 + 6


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """A server that runs the model, of which a data owner has the tokenizer only."""
    folder = tmp_path_factory.mktemp("served")
    tokenizer = build_tokenizer()
    tokenizer.save_pretrained(folder / "tokenizer")
    server = start(Settings.of(write_gguf(folder / "tiny.gguf", "F32", tokenizer_pre="gpt-2"), 128, 320))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(KEY, server.key)
        yield server.url, folder
    server.stop()


@pytest.fixture(scope="module")
def local():
    return LocalPLM(build_llama(), build_tokenizer())


def run(*arguments):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["pema", *map(str, arguments)])
        try:
            main()
        except SystemExit as stop:
            return stop.code or 0
    return 0


@pytest.fixture(scope="module")
def head(server):
    url, folder = server
    assert not run("recover", url, "--tokenizer", folder / "tokenizer", "-o", folder / "head", "--queries", 100)
    return folder / "head"


def test_what_is_needed_is_said_first(server, tmp_path, capsys):
    url, folder = server
    assert run("recover", url, "--tokenizer", folder / "tokenizer", "-o", tmp_path / "head") == 2
    said = " ".join(capsys.readouterr().err.split())
    assert f"the LM head of tiny.gguf needs about {QUERIES} requests for its width of 32, each for the log-prob" in said
    assert f"Nothing was requested: give the maximum number, such as --queries {QUERIES}." in said
    assert not [*tmp_path.iterdir()]


def test_the_recovered_head(head):
    report = json.loads((head / "recovery.json").read_text())
    assert report["d"] == 32
    assert report["queries"] == QUERIES
    assert report["largest_error"] < 1e-3


def test_the_contract_holds(server, head, local, capsys):
    plm = open_plm(f"logprobs+{server[0]}#{head}")
    assert plm.deviation < 0.01
    assert "head(f) differs from the log-probabilities of" in capsys.readouterr().err
    texts = [local.tokenizer(text).input_ids for text in ("the house and the dog", "one two three", "a cat")]

    def compare(ours, theirs):
        # The engine keeps keys and values in float16.
        ours, theirs = plm.head()(ours), local.head()(theirs)
        torch.testing.assert_close(ours.log_softmax(1), theirs.log_softmax(1), rtol=0, atol=0.05)

    for a in plm.represent(texts, [2, 3, 1]):
        compare(a.representations, next(iter(local.represent([texts[a.index]], [(2, 3, 1)[a.index]]))).representations)
    for a in plm.predict(texts, [6, 1, 9]):
        (b,) = local.predict([texts[a.index]], [(6, 1, 9)[a.index]])
        assert a.generated.tolist() == b.generated.tolist()
        compare(a.representations, b.representations)
    ours, theirs = plm.open_session(texts), local.open_session(texts)
    for chosen, parents in (([5, 6, 7], None), ([20, 21, 22, 23], [2, 0, 0, 1])):
        ours.advance(chosen, parents)
        theirs.advance(chosen, parents)
        compare(ours.representations, theirs.representations)


def test_build_train_and_generate_from_the_command_line(server, head, tmp_path):
    lines = [{"source": text, "target": text[::-1]} for text in ("abc", "dog", "cat", "house")]
    data = tmp_path / "train.jsonl"
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    plm, memory, adapter = f"logprobs+{server[0]}#{head}", tmp_path / "memory", tmp_path / "adapter"
    template = ("--task", "reply", "--template", "{source} =", "--no-chat")
    assert not run("build", "--plm", plm, "--data", data, *template, "-o", memory)
    assert not run("train", memory, "-o", adapter, "--epochs", "2")
    output = tmp_path / "out.jsonl"
    assert not run("generate", adapter, "--plm", plm, "--data", data, "-o", output, "--max-new-tokens", "5")
    texts = [json.loads(line)["text"] for line in output.read_text().splitlines()]
    # The same in Python gives the same.
    again = pema.generate(
        open_plm(plm), pema.Adapter.from_pretrained(adapter), [line["source"] for line in lines], max_new_tokens=5
    )
    assert again == texts


KILLED = """
import os, sys
from pema.owner.logprobs import recover
from pema.owner.logprobs.answers import Answers
add = Answers.add
def add_and_die(self, row):
    add(self, row)
    if len(self) == 20:
        os.kill(os.getpid(), 9)
Answers.add = add_and_die
recover.recover_head(*sys.argv[1:4], queries=100)
"""


def test_a_recovery_that_was_killed_continues(server, head, tmp_path):
    url, folder = server
    arguments = [url, str(folder / "tokenizer"), str(tmp_path / "head")]
    assert subprocess.run([sys.executable, "-c", KILLED, *arguments], timeout=300, check=False).returncode == -9
    assert len(list((tmp_path / "head.queries").glob("answer-*.safetensors"))) == 20
    assert not run("recover", url, "--tokenizer", folder / "tokenizer", "-o", tmp_path / "head", "--queries", 100)
    assert (tmp_path / "head" / "head.safetensors").stat().st_size == (head / "head.safetensors").stat().st_size
    assert not (tmp_path / "head.queries").exists()
