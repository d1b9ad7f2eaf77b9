"""An API from end to end: llama.cpp's own OpenAI-compatible server, from Python and the command line."""

import json
import os
import signal
import subprocess
import sys

import pytest
import torch
from fake_api import KEY

import pema
from gguf_files import write_gguf
from pema.cli import main
from pema.errors import OwnerError
from pema.owner.contract import GivesProposals
from pema.owner.llamacpp.process import Settings, start
from pema.owner.local import LocalPLM
from pema.owner.opening import open_plm
from pema.tasks.example import Example
from pema.tasks.registry import get_task
from tiny import build_model, build_tokenizer

pytest.importorskip("xllamacpp")
pytest.importorskip("gguf")
pytest.importorskip("accelerate")

WORDS = ["house", "dog", "cat", "bird", "tree", "fish", "horse", "cow"]
EXAMPLES = [Example(f"a {word}", f"the {word} of mine") for word in WORDS]
TRAINING = {"epochs": 3, "batch_size": 16, "rank": 16, "copy_width": 4, "copy_least": 0.0}


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf", "F32", tokenizer_pre="gpt-2")


@pytest.fixture(scope="module")
def served(file):
    server = start(Settings(str(file), 1024, 128, 1, 4))
    yield server
    server.stop()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The folder of the proxy."""
    folder = tmp_path_factory.mktemp("proxy")
    build_model("llama", seed=1, vocab_size=290).save_pretrained(folder)
    build_tokenizer(vocab_size=290).save_pretrained(folder)
    return folder


@pytest.fixture
def described(served, file, folder, tmp_path, monkeypatch):
    """A function that writes the description of the server as an API."""
    monkeypatch.setenv(KEY, served.key)

    def write(name="api.toml", **settings):
        given = {
            "base_url": f"{served.url}/v1",
            "model": "tiny",
            "tokenizer": str(file),
            "proxy": str(folder),
            "endpoint": "completions",
            "key": KEY,
            "cache": "answers.sqlite",
        }
        lines = [f"{key} = {json.dumps(value)}" for key, value in (given | settings).items()]
        (tmp_path / name).write_text("\n".join(lines))
        return tmp_path / name

    return write


def test_its_answers_are_those_of_the_model(described, file):
    plm, loaded = open_plm(described()), LocalPLM.load(file)
    assert isinstance(plm, GivesProposals)
    (prompt,) = get_task("style").template.encode_prompts(plm.tokenizer, ["a house"])
    proposal = plm.propose(prompt.prompt, (), 4)
    assert proposal.tokens
    written, compared = list(prompt.prompt), 0
    for token, top in zip(proposal.tokens, proposal.top, strict=True):
        with torch.no_grad():
            log_p = torch.log_softmax(loaded.model(torch.tensor([written])).logits[0, -1], -1)
        for other, given in top if len(top) > 1 else ():  # a part of a character or the end has none
            assert given == pytest.approx(float(log_p[other]), abs=0.05)
            compared += 1
        written.append(token)
    assert compared >= 15


def test_the_command_line_and_python_adapt_it_alike(described, tmp_path, monkeypatch, capsys):
    file, data = described(), tmp_path / "data.jsonl"
    data.write_text("\n".join(json.dumps(example.to_row()) for example in EXAMPLES))
    settings = [part for name, value in TRAINING.items() for part in ("--set", f"{name}={value}")]
    for command in (
        ("build", "--plm", file, "--data", data, "--task", "style", "-o", tmp_path / "memory"),
        ("train", tmp_path / "memory", "-o", tmp_path / "adapter", *settings),
        ("generate", tmp_path / "adapter", "--plm", file, "--data", data, "-o", tmp_path / "out.jsonl"),
    ):
        monkeypatch.setattr(sys, "argv", ["pema", *map(str, command)])
        with pytest.raises(SystemExit) as ended:
            main()
        said = capsys.readouterr().err
        assert not ended.value.code, said
    assert "requests a token" in said.replace("\n", " ")
    texts = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    plm = pema.PLM.from_pretrained(file)
    adapter = plm.adapt(EXAMPLES, "style", pema.preset("best", **TRAINING))
    written = plm.generate([example.source for example in EXAMPLES], adapter)
    assert [text.get("output", text.get("text")) for text in texts] == written
    with pytest.raises(OwnerError, match="has no model for the `generate` of transformers"), plm.use(adapter):
        pass


def test_a_killed_generation_continues_with_the_answers_that_it_got(described, tmp_path):
    file = described(max_requests=3, block=1)
    task, sources = get_task("style"), [example.source for example in EXAMPLES]
    plm = pema.PLM.from_pretrained(file)
    with pytest.raises(OwnerError, match="could exceed the budget max_requests=3"):
        plm.generate(sources, task=task, max_new_tokens=4)
    code = (
        "import os, sys, pema\n"
        "from pema.owner.openai_api import client\n"
        "ask = client.Client.ask\n"
        "def last(self, *given):\n"
        "    answer = ask(self, *given)\n"
        "    if self.spending.requests >= 5: os.kill(os.getpid(), 9)\n"
        "    return answer\n"
        "client.Client.ask = last\n"
        f"pema.PLM.from_pretrained({str(described(max_requests=8, parallel=1))!r}).generate({sources!r}, "
        "task='style', max_new_tokens=4)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], env=dict(os.environ), timeout=300)
    assert done.returncode == -signal.SIGKILL
    assert plm.proposer is not None
    again = pema.PLM.from_pretrained(described(max_requests=8))
    assert len(again.generate(sources, task=task, max_new_tokens=4)) == 8
    assert "8 requests with" in str(again._plm._client.spending)
