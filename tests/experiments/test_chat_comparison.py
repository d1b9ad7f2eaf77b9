"""A comparison on a chat model: every method has the same prompts, earlier turns included, and results record them."""

import json

import pytest
from tests.tiny import build_model, build_tokenizer

from pema.adapter.module import Adapter
from pema.experiments.compare import run_experiment
from pema.experiments.config import read_config
from pema.files import read_json
from pema.owner.local import LocalPLM
from pema.tasks.template import Template

CHAT = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CONFIG = """
plm = "PLM"
template = "Say {source}"
metrics = ["chrf"]
CHAT
[data]
name = "made"
train = { data = "train.jsonl" }
dev = { data = "test.jsonl" }
test = { data = "test.jsonl" }
[budget]
epochs = 1
[[methods]]
label = "alone"
method = "plm"
[[methods]]
label = "PEMA"
method = "pema"
settings = { rank = 8 }
[[methods]]
label = "kNN"
method = "knn-lm"
settings = { k = 2, temperature = 1.0, weight = 0.5 }
[[methods]]
label = "LoRA"
method = "lora"
settings = { rank = 2 }
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("chat")
    tokenizer = build_tokenizer(vocab_size=316)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = CHAT
    build_model(seed=3).save_pretrained(folder / "plm")
    tokenizer.save_pretrained(folder / "plm")
    for part, numbers in (("train", range(6)), ("test", range(30, 32))):
        talks = [
            {
                "messages": [
                    {"role": "user", "content": f"the dog {i}"},
                    {"role": "assistant", "content": f"der Hund {i}", "weight": 0},
                    {"role": "user", "content": "the house"},
                    {"role": "assistant", "content": "das Haus"},
                ]
            }
            for i in numbers
        ]
        (folder / f"{part}.jsonl").write_text("".join(f"{json.dumps(talk)}\n" for talk in talks), encoding="utf-8")
    return folder


@pytest.fixture
def prompts(monkeypatch):
    """The prompts that the model's `generate` was given, decoded."""
    seen = []
    encode = Template.encode_prompts

    def watched(self, tokenizer, sources):
        encoded = encode(self, tokenizer, sources)
        seen.extend(tokenizer.decode(each.prompt) for each in encoded)
        return encoded

    monkeypatch.setattr(Template, "encode_prompts", watched)
    return seen


def test_every_method_has_the_prompts_of_the_chat(folder, prompts):
    text = CONFIG.replace("PLM", str(folder / "plm"), 1).replace("CHAT", 'system = "Be brief."', 1)
    (folder / "chat.toml").write_text(text, encoding="utf-8")
    experiment = read_config(folder / "chat.toml", "compare")
    run_experiment(experiment, folder / "results", folder / "work")
    tokenizer = LocalPLM.load(folder / "plm").tokenizer
    digest = Template("{source}").chat_template(tokenizer)
    results = {path.stem: read_json(path) for path in (folder / "results" / "chat").glob("*seed*.json")}
    assert set(results) == {"alone-seed0", "pema-seed0", "knn-seed0", "lora-seed0"}
    for result in results.values():
        config = result["signature"]["config"]
        assert (config["template"], config["chat_template"], config["system"]) == ("Say {source}", digest, "Be brief.")
    user = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
    system = "<|im_start|>system\nBe brief.<|im_end|>\n"
    expected = {
        system + user.format(f"the dog {i}") + f"der Hund {i}<|im_end|>\n" + user.format("Say the house")
        for i in (30, 31)
    }
    assert set(prompts) == expected
    adapters = list((folder / "work").glob("trained/pema-*/**/adapter_config.json"))
    assert [Adapter.from_pretrained(path.parent).config.chat_template for path in adapters] == [digest]


def test_plain_prompts_are_other_runs(folder, prompts):
    text = CONFIG.partition('[[methods]]\nlabel = "PEMA"')[0].replace("PLM", str(folder / "plm"), 1)
    text = text.replace("CHAT", "chat = false", 1)
    for part in ("train", "test"):
        (folder / f"{part}.tsv").write_text("the house\tdas Haus\nthe dog\tder Hund\n", encoding="utf-8")
    (folder / "plain.toml").write_text(text.replace(".jsonl", ".tsv"), encoding="utf-8")
    run_experiment(read_config(folder / "plain.toml", "compare"), folder / "results", folder / "work")
    config = read_json(folder / "results" / "plain" / "alone-seed0.json")["signature"]["config"]
    assert config["template"] == "Say {source}"
    assert "chat_template" not in config
    assert set(prompts) == {"<s>Say the house", "<s>Say the dog"}
