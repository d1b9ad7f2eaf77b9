"""`--chat`, `--no-chat` and `--system`: stored by a build, checked by a generation."""

import json
import sys

import pytest

import pema
from pema.cli import main
from pema.memory.manifest import Manifest
from tiny import build_model, build_tokenizer

CHAT = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("chat")
    tokenizer = build_tokenizer(vocab_size=316)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    for name, template in (("plain", None), ("chat", CHAT)):
        tokenizer.chat_template = template
        build_model().save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    turns = [("user", "the dog"), ("assistant", "der Hund"), ("user", "the house"), ("assistant", "das Haus")]
    talk = {"messages": [{"role": role, "content": content} for role, content in turns]}
    (folder / "talk.jsonl").write_text(json.dumps(talk) + "\n", encoding="utf-8")
    (folder / "pairs.tsv").write_text("the house\tdas Haus\nthe dog\tder Hund\n", encoding="utf-8")
    return folder


@pytest.fixture
def run(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["pema", *arguments])
        with pytest.raises(SystemExit) as stop:
            main()
        return stop.value.code or 0, " ".join(capsys.readouterr().err.split())

    return run


def test_a_chat_is_built_and_used_by_default(run, folder):
    build = ("build", "--task", "translation", "--template", "{source}")
    assert run(*build, "--plm", "chat", "--data", "talk.jsonl", "--system", "Be brief.", "-o", "m")[0] == 0
    manifest = Manifest.read(folder / "m")
    assert manifest.system == "Be brief."
    assert manifest.chat_template is not None
    training = ("--rank", "4", "--epochs", "1", "--set", "dev_fraction=0", "--set", "device=cpu")
    assert run("train", "m", "-o", "a", *training)[0] == 0
    generate = ("generate", "a", "--plm", "chat", "--data", "talk.jsonl", "-o", "o.jsonl", "--max-new-tokens", "4")
    assert run(*generate)[0] == run(*generate, "--chat", "--system", "Be brief.")[0] == 0
    assert len((folder / "o.jsonl").read_text(encoding="utf-8").splitlines()) == 2
    code, error = run(*generate, "--no-chat")
    assert (code, "was trained with a chat, not with plain prompts: leave out --chat" in error) == (1, True)
    code, error = run(*generate, "--system", "Be kind.")
    assert (code, "with the system prompt 'Be brief.', not with 'Be kind.'" in error) == (1, True)
    inspect = ("inspect", "a", "--plm", "chat", "--text", "the house", "-o", "page.html", "--max-new-tokens", "4")
    assert run(*inspect)[0] == 0
    assert run(*inspect, "--no-chat")[0] == 1


def test_plain_prompts_are_built_on_request_and_without_a_chat_template(run, folder):
    build = ("build", "--task", "translation", "--data", "pairs.tsv")
    assert run(*build, "--plm", "chat", "--no-chat", "-o", "no-chat")[0] == 0
    assert run(*build, "--plm", "plain", "-o", "no-template")[0] == 0
    assert {Manifest.read(folder / name).chat_template for name in ("no-chat", "no-template")} == {None}
    code, error = run(*build, "--plm", "plain", "--chat", "-o", "refused")
    assert (code, "the PLM's tokenizer has no chat template: leave out --chat" in error) == (2, True)
    code, error = run(*build, "--plm", "chat", "--chat", "-o", "no-chat")
    assert (code, "was built with plain prompts, here they are chat prompts" in error) == (1, True)
    code, error = run("build", "--task", "qa", "--data", "talk.jsonl", "--plm", "plain", "-o", "refused")
    assert (code, "the example has 2 earlier turns, and plain prompts have no place for them" in error) == (1, True)


def test_demonstrations_are_written_learned_from_and_generated_with(run, folder):
    showing = ("demonstrate", "--task", "translation", "--template", "In: {source}", "--pool", "pairs.tsv", "-k", "1")
    assert run(*showing, "--data", "pairs.tsv", "-o", "shown.jsonl")[0] == 0
    (folder / "new.txt").write_text("the dogs\n", encoding="utf-8")
    assert run(*showing, "--input", "new.txt", "-o", "new.jsonl")[0] == 0
    task = pema.get_task("translation", "In: {source}")
    pairs = pema.read_examples(folder / "pairs.tsv")
    texts = [(each.source, each.target, each.history) for each in pema.demonstrate(pairs, pairs, 1, task)]
    assert [(e.source, e.target, e.history) for e in pema.read_examples(folder / "shown.jsonl")] == texts
    (row,) = map(json.loads, (folder / "new.jsonl").read_text(encoding="utf-8").splitlines())
    shown = [{"role": "user", "content": "In: the dog"}, {"role": "assistant", "content": "der Hund"}]
    assert row == {"source": "the dogs", "history": shown}
    adapt = ("--task", "translation", "--template", "In: {source}", "--rank", "4", "--epochs", "1")
    small = ("--set", "dev_fraction=0", "--set", "device=cpu")
    assert run("adapt", "--plm", "chat", "--data", "shown.jsonl", "-o", "with", *adapt, *small)[0] == 0
    written = ("--data", "new.jsonl", "-o", "out.txt", "--max-new-tokens", "4")
    assert run("generate", "with/adapter", "--plm", "chat", *written)[0] == 0
    assert len((folder / "out.txt").read_text(encoding="utf-8").splitlines()) == 1
    code, error = run(*showing, "--data", "pairs.tsv", "-o", "shown.tsv")
    assert (code, "shown.tsv: earlier turns need JSON Lines: name it .jsonl" in error) == (2, True)
    code, error = run(*showing, "-o", "shown.jsonl")
    assert (code, "give the sources once" in error) == (2, True)
