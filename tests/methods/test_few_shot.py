"""Few-shot prompts, on a tiny PLM."""

import math
from dataclasses import replace

import pytest
import torch
from tests.tiny import build_model, build_tokenizer

from pema.errors import ConfigError, DataError
from pema.generation.batches import plain
from pema.generation.decoding import decode
from pema.methods.contract import Budget, Job
from pema.methods.few_shot import FewShot, RetrievedFewShot
from pema.methods.registry import get_method
from pema.owner.local import LocalPLM
from pema.tasks.demonstrations import DemonstrationTemplate, eligible
from pema.tasks.example import Example, Turn
from pema.tasks.registry import get_task
from pema.tasks.target_statistics import count_line_breaks, stop_after
from pema.tasks.template import Template

TASK = replace(get_task("style"), template=Template("In: {source}\nOut:"))
EXAMPLES = tuple(Example(f"house {i}", f"Haus {i}") for i in range(6))
DEV = (Example("a dog", "ein Hund"), Example("a house 2", "ein Haus 2"))


@pytest.fixture(scope="module")
def plm():
    model = build_model()
    model.config.max_position_embeddings = 256  # rotary positions have no table
    return LocalPLM(model, build_tokenizer(), name="tiny")


def job(train=EXAMPLES, dev=DEV, seed=0, task=TASK):
    return Job("tiny", None, task, tuple(train), tuple(dev), seed, Budget())


def opened(method, plm, tmp_path, given=None):
    return method.open(plm, given or job(), tmp_path, tmp_path)


def text_of(plm, encoded):
    return plm.tokenizer.decode(encoded.prompt, skip_special_tokens=True)


def test_prompts_repeat_the_template_and_end_with_the_source(plm):
    template = DemonstrationTemplate("In: {source}\nOut:", demonstrations=lambda source: EXAMPLES[:2])
    (prompt,) = template.encode_prompts(plm.tokenizer, ["a dog"])
    text = "In: house 0\nOut: Haus 0\n\nIn: house 1\nOut: Haus 1\n\nIn: a dog\nOut:"
    assert text_of(plm, prompt) == text
    assert (
        prompt.prompt == Template(text.replace("a dog", "{source}")).encode_prompts(plm.tokenizer, ["a dog"])[0].prompt
    )
    (alone,) = Template("In: {source}\nOut:").encode_prompts(plm.tokenizer, ["a dog"])
    assert prompt.source_length == alone.source_length


def test_a_target_ends_with_the_separator(plm):
    template = DemonstrationTemplate("In: {source}\nOut:", demonstrations=lambda source: EXAMPLES[:1])
    (encoded,) = template.encode(plm.tokenizer, [Example("a dog", "ein Hund")])
    assert text_of(plm, encoded) == "In: house 0\nOut: Haus 0\n\nIn: a dog\nOut:"
    assert plm.tokenizer.decode(encoded.target) == " ein Hund\n\n"
    assert template.encode_prompts(plm.tokenizer, ["a dog"])[0].prompt == encoded.prompt


def test_texts_are_those_of_the_plm_after_the_prompt(plm, tmp_path):
    sources = ["a dog", "the house 3", "x"]
    found = opened(RetrievedFewShot(k=2), plm, tmp_path).generate(sources, batch_size=2)
    for source, text in zip(sources, found.texts, strict=True):
        adapted = opened(RetrievedFewShot(k=2), plm, tmp_path)
        (prompt,) = adapted._template.encode_prompts(plm.tokenizer, [source])
        whole = text_of(plm, prompt)
        limit = 2 * prompt.source_length + 16
        task = replace(TASK, template=Template(whole.replace(source, "{source}")))
        alone = decode(plm, plm.generator, [source], task, plain, max_new_tokens=limit, stop=("\n",), batch_size=1)
        assert [text] == alone.texts


def test_texts_of_several_lines_stop_at_a_blank_line(plm, tmp_path):
    train = [Example("a", "one\ntwo"), Example("b", "three")]
    given = replace(job(train), decoding={"stop": (), "max_new_tokens": 40})
    adapted = opened(FewShot(k=2), plm, tmp_path, given)
    (own,) = adapted.generate(["c"]).texts
    assert [own] == adapted.generate(["c"], stop=("\n\n",)).texts
    assert adapted._stop == ("\n\n",)
    assert "\n\n" not in own


def test_perplexity_is_that_of_the_target_and_the_separator_after_the_prompt(plm, tmp_path):
    adapted = opened(FewShot(k=3), plm, tmp_path)
    (prompt,) = adapted._template.encode_prompts(plm.tokenizer, ["a dog"])
    whole = plm.tokenizer(text_of(plm, prompt) + " ein Hund\n\n", return_tensors="pt").input_ids
    start = len(prompt.prompt)
    with torch.no_grad():
        log_p = plm.model(whole).logits[0, start - 1 : -1].log_softmax(-1)
    expected = math.exp(-float(log_p.gather(1, whole[0, start:, None]).mean()))
    assert adapted.perplexity([Example("a dog", "ein Hund")]) == pytest.approx(expected, rel=1e-5)


def test_fixed_demonstrations_are_drawn_with_the_seed_and_nested(plm, tmp_path):
    def drawn(k, seed):
        adapted = opened(FewShot(k=k), plm, tmp_path, job(seed=seed))
        return [example.source for example in adapted._selection.stored(k)]

    assert drawn(4, 1)[:2] == drawn(2, 1)
    assert len({tuple(drawn(4, seed)) for seed in range(8)}) > 4
    assert sorted(drawn(6, 3)) == sorted(example.source for example in EXAMPLES)


def test_retrieved_demonstrations_are_the_nearest_with_the_nearest_last(plm, tmp_path):
    sources = ("a red car", "the green house", "a green car", "zzz")
    train = [Example(source, str(i)) for i, source in enumerate(sources)]
    adapted = opened(RetrievedFewShot(k=2), plm, tmp_path, job(train))
    assert [each.target for each in adapted._selection.select("a green car!", 2)] == ["1", "2"]
    assert adapted.disk_bytes == sum(len(each.source) + 1 for each in train)


def test_prompts_that_are_too_long_lose_their_first_demonstrations(plm, tmp_path, capsys):
    long = [Example("word " * 12 + str(i), f"t{i}") for i in range(6)]
    adapted = opened(FewShot(k=6), plm, tmp_path, job(long, ()))
    (prompt,) = adapted._template.encode_prompts(plm.tokenizer, ["word"])
    kept = text_of(plm, prompt).count("Out:") - 1
    assert 0 < kept < 6
    assert len(prompt.prompt) + adapted._template.reserved <= plm.max_length
    last = [example.target for example in adapted._selection.stored(6)][-kept:]
    assert all(f"Out: {target}\n\n" in text_of(plm, prompt) for target in last)
    assert adapted.chosen == {"k": 6, "shortened_prompts": 1}
    assert f"1 of 1 prompts have fewer demonstrations than chosen, {6 - kept}.0 fewer" in capsys.readouterr().err
    adapted.generate(["word"])
    assert "fewer demonstrations" not in capsys.readouterr().err


def test_k_is_chosen_by_the_likelihood_of_dev(plm, tmp_path):
    for method in (FewShot, RetrievedFewShot):
        k = opened(method(), plm, tmp_path).chosen["k"]
        values = {each: opened(method(k=each), plm, tmp_path).perplexity(DEV) for each in (1, 2, 4)}
        rising = [1] + [b for a, b in ((1, 2), (2, 4)) if all(values[y] < values[x] for x, y in ((1, 2), (a, b)))]
        assert k == rising[-1]


def test_demonstrations_have_different_sources_and_are_text(plm):
    train = [
        *(Example("a", "1"), Example("a", "2"), Example("b", "3", alternatives=("4",))),
        *(Example("{source}", "5"), Example("c", f"6{plm.tokenizer.eos_token}")),
        Example("d", "7", history=(Turn("user", "e"), Turn("assistant", "f"))),
    ]
    assert [(each.source, each.target) for each in eligible(train, TASK.template, plm.tokenizer)] == [
        ("a", "1"),
        ("b", "3"),
    ]


CHAT = (
    "{% for m in messages %}<s>{{ m.role }}: {{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant: {% endif %}"
)


@pytest.fixture(scope="module")
def chat_plm():
    model, tokenizer = build_model(), build_tokenizer()
    model.config.max_position_embeddings = 256
    tokenizer.chat_template = CHAT
    return LocalPLM(model, tokenizer, name="tiny-chat")


def test_demonstrations_of_a_chat_are_turns(chat_plm, tmp_path):
    adapted = opened(FewShot(k=1), chat_plm, tmp_path, job(EXAMPLES[:1]))
    conversation = Example(
        "a dog", "ein Hund", history=(Turn("system", "Be kind."), Turn("user", "x"), Turn("assistant", "y"))
    )
    for encoded in (
        *adapted._template.encode(chat_plm.tokenizer, [conversation]),
        *adapted._template.encode_prompts(chat_plm.tokenizer, [conversation]),
    ):
        assert chat_plm.tokenizer.decode(encoded.prompt).rstrip() == (
            "<s>system: Be kind.</s><s>user: In: house 0\nOut:</s><s>assistant: Haus 0</s>"
            "<s>user: x</s><s>assistant: y</s><s>user: In: a dog\nOut:</s><s>assistant:"
        )
    (encoded,) = adapted._template.encode(chat_plm.tokenizer, [conversation])
    assert chat_plm.tokenizer.decode(encoded.target).strip() == "ein Hund</s>"
    texts = adapted.generate(["a dog", "a house"]).texts
    assert len(texts) == 2
    assert math.isfinite(adapted.perplexity(DEV))


def test_control_tokens_are_text_in_the_demonstrations_of_a_chat(chat_plm):
    train = [Example("{source}", "5"), Example("c", "6</s>")]
    assert eligible(train, TASK.template, chat_plm.tokenizer) == train


def test_chat_prompts_that_are_too_long_lose_their_first_demonstrations(chat_plm, tmp_path):
    long = [Example("word " * 12 + str(i), f"t{i}") for i in range(6)]
    adapted = opened(FewShot(k=6), chat_plm, tmp_path, job(long, ()))
    one, two = adapted._template.encode_prompts(chat_plm.tokenizer, ["word", "word " * 20])
    counts = [text_of(chat_plm, each).count("Out:") for each in (one, two)]
    assert 1 < counts[1] < counts[0] < 7
    assert adapted.chosen["shortened_prompts"] == 2


def test_where_texts_stop():
    assert stop_after(count_line_breaks(["one line\n"])) == ("\n",)
    assert stop_after(count_line_breaks(["two\nlines", "one"])) == ("\n\n",)
    assert stop_after(count_line_breaks(["two\n\nparagraphs"])) == ()


def test_errors(plm, tmp_path):
    with pytest.raises(ConfigError, match=r"k=7 demonstrations need as many different sources.*have 6"):
        opened(FewShot(k=7), plm, tmp_path)
    with pytest.raises(ConfigError, match="few-shot chooses k on dev examples, and there are none"):
        opened(FewShot(), plm, tmp_path, job(dev=()))
    with pytest.raises(DataError, match="no training example can be a demonstration"):
        opened(FewShot(), plm, tmp_path, job([Example("{source}", "x")]))
    with pytest.raises(DataError, match="no training example can be a demonstration"):
        FewShot().require_examples([Example("d", "7", history=(Turn("user", "e"), Turn("assistant", "f")))], DEV)
    with pytest.raises(ConfigError, match=r"k=3 demonstrations need as many different sources.*have 2: lower k"):
        RetrievedFewShot(k=3).require_examples([Example("a", "1"), Example("a", "2"), Example("b", "3")], ())
    with pytest.raises(ConfigError, match="retrieved-few-shot chooses k on dev examples, and there are none"):
        RetrievedFewShot().require_examples(EXAMPLES, ())
    FewShot(k=6).require_examples(EXAMPLES, ())
    with pytest.raises(ConfigError, match="few-shot: k"):
        FewShot.of({"k": 0})
    with pytest.raises(DataError, match="source 2: the source is blank"):
        opened(FewShot(k=1), plm, tmp_path).generate(["a", " "])


def test_needs_and_costs():
    for name in ("few-shot", "retrieved-few-shot"):
        method = get_method(name)()
        assert method.needs.weights == "none"
        assert method.needs.targets_at_owner
        assert not method.needs.gradients
        assert method.trained_by == {}
        assert method.prepared_by is None
