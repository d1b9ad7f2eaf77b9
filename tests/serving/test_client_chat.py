"""A chat model behind its owner's server: the chat template goes with the tokenizer, and the ends are the same."""

import pytest
import torch
from served import listening

import pema
from pema.adapter.presets import preset
from pema.adapter.task import task_of
from pema.adapter.training import train
from pema.generation.decoding import generate_counted
from pema.owner.local import LocalPLM
from pema.pages.inspector.inspection import inspect_generation
from tiny import build_model, build_tokenizer

CHAT = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
HISTORY = (pema.Turn("user", "A house <|im_end|>?"), pema.Turn("assistant", "Ein Haus."))
EXAMPLES = [
    pema.Example("the house", "das <|im_end|> Haus"),
    pema.Example("the dog is small", "der Hund ist klein", history=HISTORY),
]
TASK = pema.Task("chat", pema.Template("{source}", system="Be brief."), (), "")


@pytest.fixture(scope="module")
def owner():
    tokenizer = build_tokenizer(vocab_size=316)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = CHAT
    return LocalPLM(build_model("llama"), tokenizer)


@pytest.fixture(scope="module")
def client(owner):
    with listening(owner) as (url, _):
        yield pema.PLM.from_pretrained(url)


def test_the_chat_template_comes_with_the_tokenizer(owner, client):
    assert client.tokenizer.chat_template == CHAT
    assert client.description.eos_token_ids == owner.description.eos_token_ids
    assert client.tokenizer.convert_tokens_to_ids("<|im_end|>") in client.description.eos_token_ids
    encoded = [TASK.template.encode(plm.tokenizer, EXAMPLES, apart=True) for plm in (owner, client)]
    assert encoded[0] == encoded[1]
    assert TASK.template.chat_template(client.tokenizer) == TASK.template.chat_template(owner.tokenizer)


@pytest.mark.parametrize("contexts", ["teacher", "predicted"])
def test_the_memory_and_the_texts_are_those_of_the_plm_itself(owner, client, contexts, tmp_path):
    memories = [
        pema.build_memory(plm, EXAMPLES, TASK, tmp_path / name, contexts=contexts)
        for plm, name in ((owner, "owner"), (client, "client"))
    ]
    (one,), (other,) = (memory.view().batches(1000) for memory in memories)
    assert torch.equal(one.targets, other.targets)
    assert memories[0].manifest.chat_template == memories[1].manifest.chat_template
    settings = preset("residual", rank=8, epochs=1, dev_fraction=0.0, device="cpu")
    adapter, _ = train(memories[1], settings, tmp_path / "adapter")
    texts = [generate_counted(plm, adapter, EXAMPLES, max_new_tokens=16) for plm in (owner, client)]
    assert texts[0] == texts[1]
    schedule = adapter.config.choose_schedule()
    found = inspect_generation(client, adapter, "the house", task_of(adapter.config), schedule, max_new_tokens=8)
    user = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nthe house<|im_end|>\n"
    assert found.prompt == f"{user}<|im_start|>assistant\n"


def test_earlier_replies_are_part_of_the_prompts_and_that_is_said(owner, client, tmp_path, capsys):
    pema.build_memory(client, EXAMPLES, TASK, tmp_path / "predicted", contexts="predicted")
    said = " ".join(capsys.readouterr().err.split())
    assert "1 examples have earlier replies in their history: these are part of the prompts" in said
    for plm, settings in ((client, {"contexts": "teacher"}), (owner, {"contexts": "predicted"})):
        pema.build_memory(plm, EXAMPLES, TASK, tmp_path / settings["contexts"] / "other", **settings)
        assert "earlier replies" not in capsys.readouterr().err
