import os

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from pema.errors import ConfigError, DataError
from pema.tasks.example import Example
from pema.tasks.template import EncodedExample, Template, shared_length

CORPUS = [
    "Translate this from English to German: \nThe house is small.\nGerman: Das Haus ist klein.",
    "the cat sat on the mat: die Katze sitzt auf der Matte\n\nund so weiter",
    "Label:positive Label:negative Label:neutral",
] * 3
TEMPLATES = (
    "Translate this from English to German: \n{source}\nGerman:",
    "Translate: {source}\nGerman: ",
    "{source}",
    "Label of {source}:\n",
    "{source}  ",
    "{not a slot} <{source}> =",
)
texts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=30).filter(str.strip)


def byte_level(specials="bos", merge_lines=False):
    tokenizer = Tokenizer(models.BPE())
    # Without a regular expression, merges cross words and lines, as in a tokenizer that hides a prompt's border.
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not merge_lines)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<s>", "</s>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    shape = {"bos": "<s> $A", "eos": "$A </s>", "both": "<s> $A </s>", "none": "$A"}[specials]
    used = [(name, tokenizer.token_to_id(name)) for name in ("<s>", "</s>") if name in shape]
    tokenizer.post_processor = processors.TemplateProcessing(single=shape, special_tokens=used)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


def metaspace():
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.Sequence([normalizers.Replace("\u200b", ""), normalizers.NFKC()])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    alphabet = sorted({character for text in CORPUS for character in text})
    trainer = trainers.UnigramTrainer(
        vocab_size=120,
        special_tokens=["<unk>", "<s>", "</s>"],
        unk_token="<unk>",
        initial_alphabet=alphabet,
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


TOKENIZERS = {
    "bos": byte_level("bos"),
    "eos": byte_level("eos"),
    "both": byte_level("both"),
    "none": byte_level("none"),
    "merging": byte_level("none", merge_lines=True),
    "metaspace": metaspace(),
}
BOS = {"bos", "both", "metaspace"}


def without_controls(tokenizer):
    """The same tokenizer, its control tokens under names that no text here contains."""
    content = tokenizer.backend_tokenizer.to_str()
    for name in ("<s>", "</s>", "<pad>", "<unk>"):
        content = content.replace(f'"{name}"', f'"a name of {name} that no text contains"')
    return Tokenizer.from_str(content)


OF_TEXT = {name: without_controls(tokenizer) for name, tokenizer in TOKENIZERS.items()}


def ids(name, text):
    """The tokens of a user's text, in which `<s>` is three characters."""
    return tuple(OF_TEXT[name].encode(text, add_special_tokens=False).ids)


def slowly(name, template, example):
    """The definition, one example at a time."""
    tokenizer = TOKENIZERS[name]
    before, after = template.split("{source}")
    filled = before + example.source + after
    prompt_text = filled
    while prompt_text.endswith(" "):
        prompt_text = prompt_text[:-1]
    gap = filled[len(prompt_text) :]
    if not gap:
        gap = "" if prompt_text[-1].isspace() else " "
    start = (tokenizer.bos_token_id,) if name in BOS else ()
    whole = start + ids(name, prompt_text + gap + example.target)
    prompt = start + ids(name, prompt_text)
    cut = 0
    while cut < min(len(prompt), len(whole)) and prompt[cut] == whole[cut]:
        cut += 1
    target = whole[cut:]
    if not target or target[-1] != tokenizer.eos_token_id:
        target = (*target, tokenizer.eos_token_id)
    return EncodedExample(whole[:cut], target, max(1, len(ids(name, example.source))))


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(pairs=st.lists(st.tuples(texts, texts), min_size=1, max_size=4), template=st.sampled_from(TEMPLATES))
@example(pairs=[("0", "<s>"), ("s", "<unk>"), ("a <s> b", "a</s>b")], template=TEMPLATES[0])
@example(pairs=[("s", "s"), ("/s", "<s>")], template=TEMPLATES[5])
def test_encode_equals_the_definition_on_any_text(name, pairs, template):
    examples = [Example(*pair) for pair in pairs]
    try:
        found = Template(template).encode(TOKENIZERS[name], examples)
    except DataError:  # a tokenizer may drop a whole text or merge it whole; the tests of the messages are below
        assert name in ("metaspace", "merging")
        return
    assert found == [slowly(name, template, example) for example in examples]


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(max_examples=15, deadline=None)
@given(sources=st.lists(texts, max_size=4), template=st.sampled_from(TEMPLATES[:2]))
def test_prompts_are_what_encode_gives_where_nothing_merges(name, sources, template):
    tokenizer = TOKENIZERS[name]
    found = Template(template).encode_prompts(tokenizer, sources)
    assert [one.target for one in found] == [()] * len(sources)
    start = (tokenizer.bos_token_id,) if name in BOS else ()
    for one, source in zip(found, sources, strict=True):
        text = template.replace("{source}", source)
        assert one.prompt == start + ids(name, text.rstrip(" "))
        assert one.source_length == max(1, len(ids(name, source)))


def test_known_tokens():
    tokenizer = TOKENIZERS["both"]
    (found,) = Template("To German: {source} = ").encode(tokenizer, [Example("the cat", "die Katze")])
    assert tokenizer.decode(found.prompt) == "<s>To German: the cat ="
    assert tokenizer.decode(found.target) == " die Katze</s>"
    assert found.source_length == len(tokenizer.tokenize("the cat"))
    assert found.target.count(tokenizer.eos_token_id) == 1


@pytest.mark.parametrize(
    ("template", "gap"),
    [("{source} =", " "), ("{source} = ", " "), ("{source} =   ", "   "), ("{source}:\n", ""), ("{source}:\n ", " ")],
)
def test_trailing_spaces_move_to_the_target(template, gap):
    prompt, separator = Template(template).fill("x")
    assert separator == gap
    assert prompt == template.replace("{source}", "x").rstrip(" ")


def test_a_merge_across_the_border_is_cut_at_the_last_shared_token():
    vocabulary = {"</s>": 0, "a": 1, "b": 2, ":": 3, "Ġ": 4, ":Ġ": 5, ":Ġb": 6}
    raw = Tokenizer(models.BPE(vocab=vocabulary, merges=[(":", "Ġ"), (":Ġ", "b")]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="</s>")
    (found,) = Template("{source}:").encode(tokenizer, [Example("a", "ba")])
    assert found == EncodedExample((1,), (6, 1, 0), 1)
    (prompt,) = Template("{source}:").encode_prompts(tokenizer, ["a"])
    assert prompt.prompt == (1, 3)
    raw.model = models.BPE(vocab={**vocabulary, "a:": 7, "a:Ġ": 8}, merges=[("a", ":"), ("a:", "Ġ")])
    with pytest.raises(DataError, match=r"f:1: the tokenizer merges the whole prompt with the target"):
        Template("{source}:").encode(
            PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="</s>"), [Example("a", "b", "f:1")]
        )


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(source=texts, targets=st.lists(texts, min_size=2, max_size=4), template=st.sampled_from(TEMPLATES))
def test_a_prompt_apart_tells_nothing_of_its_target(name, source, targets, template):
    """Whoever is sent the prompt could else see how the target begins, where the tokenizer merges across the border."""
    tokenizer, template = TOKENIZERS[name], Template(template)
    try:
        (prompt,) = template.encode_prompts(tokenizer, [source])
        encoded = template.encode(tokenizer, [Example(source, target) for target in targets], apart=True)
    except DataError:
        return
    assert {one.prompt for one in encoded} == {prompt.prompt}
    if name != "metaspace":  # whose unknown characters cannot be read back
        before, gap = template.fill(source)
        for one, target in zip(encoded, targets, strict=True):
            ended = one.target[:-1] if not target.endswith("</s>") else one.target
            read = tokenizer.decode(one.prompt[name in BOS :] + ended, clean_up_tokenization_spaces=False)
            assert read == before + gap + target


def test_a_merge_across_the_border_does_not_reach_a_prompt_apart():
    vocabulary = {"</s>": 0, "a": 1, "b": 2, ":": 3, "Ċ": 4, "ĊĊ": 5}
    raw = Tokenizer(models.BPE(vocab=vocabulary, merges=[("Ċ", "Ċ")]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    raw.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="</s>")
    template, pairs = Template("{source}:\n"), [Example("a", "b"), Example("a", "\nb")]
    assert [one.prompt for one in template.encode(tokenizer, pairs)] == [(1, 3, 4), (1, 3)]
    apart = template.encode(tokenizer, pairs, apart=True)
    assert apart == [EncodedExample((1, 3, 4), (2, 0), 1), EncodedExample((1, 3, 4), (4, 2, 0), 1)]


def test_eos_occurs_once_even_if_the_text_contains_its_characters():
    tokenizer = TOKENIZERS["bos"]
    (found,) = Template("{source} =").encode(tokenizer, [Example("a", "b</s>")])
    assert found.target[-1] == tokenizer.eos_token_id
    assert found.target.count(tokenizer.eos_token_id) == 1


def test_many_examples_keep_their_order_across_chunks(monkeypatch):
    monkeypatch.setattr("pema.tasks.template.CHUNK", 3)
    examples = [Example(f"source {i}", f"target {i}") for i in range(10)]
    found = Template("{source} =").encode(TOKENIZERS["bos"], examples)
    assert found == [slowly("bos", "{source} =", example) for example in examples]
    assert Template("{source} =").encode_prompts(TOKENIZERS["bos"], [e.source for e in examples]) == [
        EncodedExample(one.prompt, (), one.source_length) for one in found
    ]
    with pytest.raises(DataError, match=r"example 8: the target is blank"):
        Template("{source} =").encode(TOKENIZERS["bos"], [*examples[:7], Example("a", " ")])
    with pytest.raises(DataError, match=r"source 5: the source is blank"):
        Template("{source} =").encode_prompts(TOKENIZERS["bos"], ["a", "b", "c", "d", "\n"])
    assert Template("{source} =").encode(TOKENIZERS["bos"], []) == []


@pytest.mark.parametrize("name", TOKENIZERS)
def test_overhead_gives_back_the_source_length(name):
    template = Template(TEMPLATES[0])
    overhead = template.prompt_overhead_tokens(TOKENIZERS[name])
    (found,) = template.encode_prompts(TOKENIZERS[name], ["The cat sat on the mat."])
    assert abs(len(found.prompt) - overhead - found.source_length) <= 1
    with pytest.warns(DeprecationWarning, match="overhead is now prompt_overhead_tokens"):
        assert template.overhead(TOKENIZERS[name]) == overhead


def test_instruction_is_the_shared_text():
    assert Template(TEMPLATES[0]).instruction == "Translate this from English to German: \n"
    assert Template("{source} =").instruction == ""


@pytest.mark.parametrize(("text", "count"), [("no slot", 0), ("{source} and {source}", 2), ("{ source }", 0)])
def test_a_template_contains_the_source_once(text, count):
    with pytest.raises(ConfigError, match=rf"contains \{{source\}} {count} times"):
        Template(text)


@pytest.mark.parametrize(
    ("example", "message"),
    [
        (Example("a", "", "train.tsv:7"), r"train\.tsv:7: the target is blank"),
        (Example("a", " \t", "train.tsv:7"), r"train\.tsv:7: the target is blank"),
        (Example("", "b", "train.tsv:7"), r"train\.tsv:7: the source is blank"),
        (Example("a", "\u200b", "train.tsv:7"), r"train\.tsv:7: the target '\\u200b' tokenises to nothing"),
    ],
)
def test_unusable_examples_are_named(example, message):
    with pytest.raises(DataError, match=message):
        Template("{source} =").encode(TOKENIZERS["metaspace"], [example])


def test_a_source_that_tokenises_to_nothing_has_length_one():
    (found,) = Template("Word {source} =").encode_prompts(TOKENIZERS["metaspace"], ["\u200b"])
    assert found.source_length == 1


def test_a_prompt_that_tokenises_to_nothing_is_named():
    raw = Tokenizer(models.WordLevel({"word": 0}, unk_token="word"))
    raw.normalizer = normalizers.Replace("\u200b", "")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="word")
    with pytest.raises(DataError, match="source 1: the prompt tokenises to nothing"):
        Template("{source}").encode_prompts(tokenizer, ["\u200b"])


def test_a_tokenizer_without_eos_is_refused():
    tokenizer = byte_level("none")
    tokenizer.eos_token = None
    with pytest.raises(ConfigError, match="has no end-of-sequence token"):
        Template("{source} =").encode(tokenizer, [Example("a", "b")])


@pytest.mark.parametrize("lengths", [((), ()), ((1,), ()), ((1, 2), (1, 2)), ((1, 2, 3), (1, 2, 4)), ((1,), (1, 2))])
def test_shared_length(lengths):
    a, b = lengths
    expected = 0
    for x, y in zip(a, b, strict=False):
        if x != y:
            break
        expected += 1
    assert shared_length(a, b) == expected


@pytest.mark.skipif("PEMA_TEST_PLM" not in os.environ, reason="PEMA_TEST_PLM names no PLM folder")
def test_a_real_tokenizer():
    tokenizer = AutoTokenizer.from_pretrained(os.environ["PEMA_TEST_PLM"])
    text = "Translate this from English to German: \nGood morning.\nGerman: Guten Morgen."
    (found,) = Template(TEMPLATES[0]).encode(tokenizer, [Example("Good morning.", "Guten Morgen.")])
    assert list(found.prompt + found.target)[: len(tokenizer(text)["input_ids"])] == tokenizer(text)["input_ids"]
