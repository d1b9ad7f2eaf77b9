"""A chat model from its examples to its texts: the form of the prompts is stored, used, and the same everywhere."""

import json
from dataclasses import replace

import pytest
import torch
from tokenizers import AddedToken

import pema
from pema.adapter.store import CONFIG_FILE
from pema.adapter.task import task_of
from pema.errors import ConfigError, MismatchError
from pema.generation.decoding import generate, generate_counted
from pema.memory.manifest import Manifest
from pema.owner.local import LocalPLM
from pema.pages.inspector.inspection import inspect_generation
from tiny import build_model, build_tokenizer

CHAT = (
    "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nBe kind<|im_end|>\n' }}{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
HISTORY = (pema.Turn("user", "A house?"), pema.Turn("assistant", "Ein Haus."))
EXAMPLES = [
    pema.Example("the house", "das Haus"),
    pema.Example("the dog is small", "der Hund ist klein"),
    pema.Example("the dog", "der Hund", history=HISTORY),
]
TASK = pema.Task("chat", pema.Template("{source}\nGerman:", system="Be brief."), (), "")
TRAINING = pema.preset("residual", rank=96, dropout=0.0, dev_fraction=0.0, epochs=150, learning_rate=0.01, device="cpu")


def chat_tokenizer(template=CHAT):
    tokenizer = build_tokenizer(vocab_size=316)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = template
    return tokenizer


def chat_plm(template=CHAT):
    return pema.PLM(LocalPLM(build_model("llama"), chat_tokenizer(template)))


@pytest.fixture(scope="module")
def plm():
    return chat_plm()


@pytest.fixture(scope="module", params=["teacher", "predicted"])
def adapted(request, plm, tmp_path_factory):
    """Folder and adapter."""
    folder = tmp_path_factory.mktemp(request.param)
    return folder, plm.adapt(EXAMPLES, TASK, TRAINING, folder, contexts=request.param)


def test_the_end_of_a_turn_ends_a_text(plm):
    ends = {plm.tokenizer.convert_tokens_to_ids(name) for name in ("</s>", "<|im_end|>")}
    assert set(plm.description.eos_token_ids) == ends
    plain = LocalPLM(build_model("llama"), chat_tokenizer(None))
    assert plain.description.eos_token_ids == (plm.tokenizer.eos_token_id,)
    assert plain.description.tokenizer_fingerprint == plm.description.tokenizer_fingerprint


def test_memory_and_adapter_store_the_form_of_their_prompts(adapted, plm):
    folder, adapter = adapted
    digest = TASK.template.chat_template(plm.tokenizer)
    manifest = Manifest.read(folder / "memory")
    assert (manifest.chat_template, manifest.system) == (digest, "Be brief.")
    assert (adapter.config.chat_template, adapter.config.system) == (digest, "Be brief.")
    stored = pema.Adapter.from_pretrained(folder / "adapter")
    assert (stored.config.chat_template, stored.config.system) == (digest, "Be brief.")
    card = (folder / "adapter" / "README.md").read_text()
    assert f'| prompts | a chat, system prompt "Be brief."; SHA-256 of the chat template `{digest}` |' in card


def test_the_memory_contains_the_tokens_of_the_chat(plm, tmp_path):
    memory = pema.build_memory(plm, EXAMPLES, TASK, tmp_path / "memory", dtype="float32")
    encoded = TASK.template.encode(plm.tokenizer, EXAMPLES)
    (batch,) = memory.view().batches(1000)
    assert batch.targets.tolist() == [token for example in encoded for token in example.target]
    assert {example.target[-1] for example in encoded} == {plm.tokenizer.convert_tokens_to_ids("<|im_end|>")}
    asked = [[*each.prompt, *each.target] for each in encoded], [len(each.prompt) for each in encoded]
    answers = sorted(plm.represent(*asked), key=lambda answer: answer.index)
    expected = torch.cat([answer.representations for answer in answers])
    torch.testing.assert_close(batch.representations, expected, rtol=1e-4, atol=1e-5)
    lengths = [example.source_length for example in encoded for _ in example.target]
    assert batch.source_lengths.tolist() == lengths


def test_texts_end_where_their_targets_end(adapted, plm):
    _, adapter = adapted
    if adapter.config.contexts == "predicted":
        pytest.skip("the random PLM's own text has nothing in common with the targets")
    result = generate_counted(plm, adapter, EXAMPLES, schedule=pema.Constant(1.0), max_new_tokens=40)
    assert result.texts == [example.target for example in EXAMPLES]
    assert result.cut == 0


def test_the_end_of_a_turn_is_not_part_of_a_text(tmp_path):
    """Though the tokenizer does not count it among its special tokens."""
    tokenizer = build_tokenizer(vocab_size=316)
    tokenizer.add_tokens([AddedToken(name, special=False, normalized=False) for name in ("<|im_start|>", "<|im_end|>")])
    tokenizer.chat_template = CHAT
    assert "<|im_end|>" in tokenizer.decode(tokenizer("<|im_end|>")["input_ids"], skip_special_tokens=True)
    plm = pema.PLM(LocalPLM(build_model("llama"), tokenizer))
    adapter = plm.adapt(EXAMPLES[:1], TASK, TRAINING, tmp_path)
    result = plm.generate_counted(EXAMPLES[:1], adapter, schedule=pema.Constant(1.0))
    assert (result.texts, result.finish_reasons) == (["das Haus"], ["eos_token"])
    inspected = inspect_generation(plm, adapter, "the house", task_of(adapter.config), pema.Constant(1.0))
    assert inspected.output == "das Haus"


def test_every_way_to_generate_uses_the_adapters_form(adapted, plm):
    _, adapter = adapted
    expected = generate(plm, adapter, ["the house"], TASK, max_new_tokens=20)
    open_task = pema.Task(TASK.name, pema.Template(TASK.template.text), (), "")
    for task in (None, open_task, replace(TASK, template=replace(TASK.template, chat=True))):
        assert generate(plm, adapter, ["the house"], task, max_new_tokens=20) == expected
        assert plm.generate(["the house"], adapter, task=task, max_new_tokens=20) == expected
        with plm.use(adapter):
            assert plm.generate(["the house"], task=task, max_new_tokens=20) == expected
    schedule = adapter.config.choose_schedule()
    found = inspect_generation(plm, adapter, "the house", open_task, schedule, max_new_tokens=20)
    assert [found.output] == expected
    assert found.prompt.startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nthe house\nGerman:")


def test_the_models_own_generate_continues_a_chat(adapted, plm):
    """With the prompt of transformers, and SL from the number of tokens around a source."""
    _, adapter = adapted
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "the house\nGerman:"}]
    inputs = plm.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt")
    ends = list(plm.description.eos_token_ids)
    with plm.use(adapter):
        out = plm.model.generate(**inputs, max_new_tokens=20, eos_token_id=ends, pad_token_id=0, do_sample=False)
        expected = plm.generate(["the house"], max_new_tokens=20)
    row = out[0, inputs["input_ids"].shape[1] :]
    assert [plm.tokenizer.decode(row, skip_special_tokens=True).strip()] == expected


def test_another_form_is_refused_when_generating(adapted, plm):
    _, adapter = adapted
    plain = pema.Task(TASK.name, pema.Template(TASK.template.text, chat=False), (), "")
    schedule = adapter.config.choose_schedule()
    with pytest.raises(MismatchError, match="trained with a chat, not with plain prompts"):
        generate(plm, adapter, ["the house"], plain)
    with plm.use(adapter), pytest.raises(MismatchError, match="trained with a chat, not with plain prompts"):
        plm.generate(["the house"], task=plain)
    with pytest.raises(MismatchError, match="trained with a chat, not with plain prompts"):
        inspect_generation(plm, adapter, "the house", plain, schedule)
    changed = chat_plm(CHAT + "{# changed #}")
    with pytest.raises(MismatchError, match=r"was trained with the chat template .*put that template"):
        generate(changed, adapter, ["the house"])
    with (
        pytest.raises(MismatchError, match=r"was trained with the chat template .*put that template"),
        changed.use(adapter),
    ):
        pass


def test_plain_memories_and_adapters_stay_plain(plm, tmp_path):
    """As those of earlier versions, which do not say what form their prompts have."""
    without = chat_plm(None)
    plain = pema.Task("chat", pema.Template("{source}\nGerman:"), (), "")
    examples = EXAMPLES[:2]
    adapter = without.adapt(examples, plain, replace(TRAINING, epochs=2), tmp_path)
    values = json.loads((tmp_path / "memory" / "manifest.json").read_text())
    assert not {"chat_template", "system"} & values.keys()
    path = tmp_path / "adapter" / CONFIG_FILE
    config = json.loads(path.read_text())
    del config["pema"]["chat_template"], config["pema"]["system"]
    path.write_text(json.dumps(config))
    old = pema.Adapter.from_pretrained(tmp_path / "adapter")
    assert plm.generate(["the house"], old) == without.generate(["the house"], adapter)
    again = pema.build_memory(plm, examples, plain, tmp_path / "memory")
    assert again.manifest.chat_template is None
    chosen = replace(plain, template=replace(plain.template, chat=True))
    with pytest.raises(MismatchError, match=r"was built with plain prompts, here they are chat prompts with no system"):
        pema.build_memory(plm, examples, chosen, tmp_path / "memory")


def test_a_memory_is_continued_in_its_own_form(plm, tmp_path):
    chat = pema.Task("chat", pema.Template("{source}\nGerman:"), (), "")
    pema.build_memory(plm, EXAMPLES[:1], chat, tmp_path / "memory")
    more = pema.build_memory(plm, EXAMPLES[1:], chat, tmp_path / "memory", append=True)
    assert more.manifest.chat_template == chat.template.chat_template(plm.tokenizer)
    whole = pema.build_memory(plm, EXAMPLES, chat, tmp_path / "whole")
    (one,), (other,) = more.view().batches(1000), whole.view().batches(1000)
    assert torch.equal(one.targets, other.targets)
    plain = replace(chat, template=replace(chat.template, chat=False))
    with pytest.raises(MismatchError, match=r"was built with chat prompts with no system .* are plain prompts"):
        pema.build_memory(plm, EXAMPLES, plain, tmp_path / "memory")
    with pytest.raises(MismatchError, match=r"with no system prompt .* with the system prompt 'Be brief.'"):
        pema.build_memory(plm, EXAMPLES, TASK, tmp_path / "memory")


def test_a_chat_that_the_plm_has_no_template_for_is_refused(tmp_path):
    without = chat_plm(None)
    chosen = replace(TASK, template=pema.Template("{source}", chat=True))
    with pytest.raises(ConfigError, match="the PLM's tokenizer has no chat template: leave out --chat"):
        pema.build_memory(without, EXAMPLES[:2], chosen, tmp_path / "memory")
    assert not (tmp_path / "memory").exists()
    with pytest.raises(ConfigError, match="the PLM's tokenizer has no chat template: leave out --chat"):
        without.generate(["a"], task=chosen)
