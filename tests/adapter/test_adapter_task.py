import pytest
from made_memories import make_memory

from pema.adapter.card import card
from pema.adapter.config import AdapterConfig, TrainConfig
from pema.adapter.optimisation import adapter_config
from pema.adapter.presets import preset
from pema.adapter.task import require_task, task_of
from pema.errors import ConfigError, MismatchError
from pema.tasks.registry import get_task
from pema.tasks.target_statistics import TargetStatistics
from tiny import build_tokenizer

OWN = "Übersetze: {source}"
STYLE = get_task("style").template.text
CHAT = (
    "{% for m in messages %}{{ '<s>' + m['role'] + ':' + m['content'] + '</s>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<s>assistant:' }}{% endif %}"
)


def config(**values):
    return AdapterConfig(d=6, vocabulary_size=11, rank=2, **values)


def test_an_adapter_says_its_task_and_template():
    own = config(task="translation", template=OWN)
    assert task_of(own) == task_of(own, "translation") == task_of(own, "translation", OWN)
    assert task_of(own) == get_task("translation", OWN, chat=False)
    assert require_task(own, task_of(own)) == task_of(own)
    assert require_task(own, get_task("translation", OWN)) == task_of(own)


def test_the_users_task_is_used_and_refused_if_it_differs():
    own = config(task="translation", template=OWN)
    for name, template in ((None, "{source} ="), ("style", None), ("style", OWN), ("translation", "{source} =")):
        chosen = task_of(own, name, template)
        assert chosen == get_task(name or "translation", template, chat=False)
        with pytest.raises(MismatchError, match=r"the adapter was trained with the (task|template) '.*', not with '"):
            require_task(own, chosen)


def test_a_task_of_the_users_own():
    own = config(task="mine", template=OWN)
    assert (task_of(own).name, task_of(own).template.text) == ("mine", OWN)
    require_task(own, task_of(own))
    with pytest.raises(ConfigError, match="unknown task 'mine'"):
        task_of(own, "mine")


def test_an_adapter_that_records_no_task():
    bare = config()
    with pytest.raises(ConfigError, match="the adapter does not record its task: name it with --task"):
        task_of(bare)
    assert task_of(bare, "style") == get_task("style")
    assert require_task(bare, get_task("style", chat=True)) == get_task("style", chat=True)
    require_task(config(task="style"), get_task("style", "{source} ="))


def with_chat_template(text):
    tokenizer = build_tokenizer()
    tokenizer.chat_template = text
    return tokenizer


def test_an_adapter_says_whether_its_prompts_are_a_chat():
    tokenizer = with_chat_template(CHAT)
    digest = get_task("style").template.chat_template(tokenizer)
    own = config(task="style", template=STYLE, chat_template=digest, system="Be brief.")
    expected = get_task("style", chat=True, system="Be brief.")
    assert task_of(own) == task_of(own, chat=True) == task_of(own, system="Be brief.", chat=True) == expected
    for task in (get_task("style"), get_task("style", chat=True), get_task("style", system="Be brief."), expected):
        assert require_task(own, task) == require_task(own, task, tokenizer) == expected
    plain = config(task="style", template=STYLE)
    assert require_task(plain, get_task("style"), tokenizer) == get_task("style", chat=False)
    silent = config(task="style", template=STYLE, chat_template=digest)
    assert require_task(silent, get_task("style"), tokenizer) == get_task("style", chat=True)


@pytest.mark.parametrize(
    ("own", "named", "message"),
    [
        ({"chat_template": "0" * 64}, {"chat": False}, "trained with a chat, not with plain prompts"),
        ({}, {"chat": True}, "trained with plain prompts, not with a chat"),
        ({}, {"system": "Be brief."}, "trained without a system prompt, not with 'Be brief.'"),
        ({"chat_template": "0" * 64}, {"system": "Be brief."}, "trained without a system prompt, not with 'Be brief.'"),
        (
            {"chat_template": "0" * 64, "system": "Be kind."},
            {"system": "Be brief."},
            "trained with the system prompt 'Be kind.', not with 'Be brief.'",
        ),
    ],
)
def test_another_form_of_prompts_is_refused(own, named, message):
    own = config(task="style", template=STYLE, **own)
    for task in (get_task("style", **named), task_of(own, **named)):
        with pytest.raises(MismatchError, match=f"the adapter was {message}: leave out --chat, --no-chat and --system"):
            require_task(own, task)


def test_another_chat_template_is_refused():
    digest = get_task("style").template.chat_template(with_chat_template(CHAT))
    own = config(task="style", template=STYLE, chat_template=digest)
    other = with_chat_template(CHAT + "{# another #}")
    with pytest.raises(MismatchError, match=rf"chat template {digest[:12]} .* tokenizer has [0-9a-f]{{12}}: put that"):
        require_task(own, task_of(own), other)
    with pytest.raises(MismatchError, match=rf"chat template {digest[:12]} .* tokenizer has none: put that"):
        require_task(own, task_of(own), with_chat_template(None))


def test_an_adapter_stores_how_its_texts_end():
    own = config(task="translation", template=OWN, max_new_tokens=48, stop=["\n", "##"])
    assert own.stop == ("\n", "##")
    assert AdapterConfig.from_dict(own.to_dict()) == own
    assert "| maximum output length | 48 tokens |" in card(own)
    assert '| stop strings | `"\\n"`, `"##"` |' in card(own)
    # Adapters of older versions have neither.
    older = {name: value for name, value in own.to_dict().items() if name not in ("max_new_tokens", "stop")}
    read = AdapterConfig.from_dict(older)
    assert (read.max_new_tokens, read.stop) == (None, ())
    assert "| maximum output length | 2 SL + 16 tokens |" in card(read)
    for name, value, message in (
        ("max_new_tokens", 0, "max_new_tokens=0 is too small"),
        ("stop", [""], r"stop\[0\]='' is empty"),
        ("stop", ["\x1b"], "contains control characters"),
    ):
        with pytest.raises(ConfigError, match=message):
            AdapterConfig.from_dict(own.to_dict() | {name: value})


def test_limit_and_stop_strings_come_from_the_memory_and_never_under_privacy(tmp_path):
    memory = make_memory(tmp_path / "memory")
    assert memory.manifest.statistics is None
    assert (
        adapter_config(memory, TrainConfig(rank=2)).max_new_tokens,
        adapter_config(memory, TrainConfig(rank=2)).stop,
    ) == (
        None,
        (),
    )
    memory.manifest = memory.manifest.with_statistics(TargetStatistics(longest=30, common=30, line_breaks=1))
    stored = adapter_config(memory, TrainConfig(rank=2))
    assert (stored.max_new_tokens, stored.stop) == (40, ("\n\n",))
    # Lengths of targets are read without noise.
    private = adapter_config(memory, preset("private", dp_epsilon=8.0, dp_delta=1e-3, rank=2))
    assert (private.max_new_tokens, private.stop) == (None, ())
