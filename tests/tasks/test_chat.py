import datetime
import inspect

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from pema.errors import ConfigError, DataError
from pema.tasks.chat import DATE, end_of_turn, has_chat_template
from pema.tasks.example import Example, Turn
from pema.tasks.template import Template

SPECIAL = ["<s>", "</s>", "<pad>", "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>"]
SPECIAL += ["<|eot_id|>", "<start_of_turn>", "<end_of_turn>", "[INST]", "[/INST]", "<think>", "</think>", "<|User|>"]
NOT_SPECIAL = ["<tool_call>", "<unused>"]
CONTROLS = [*SPECIAL, *NOT_SPECIAL, "<mask>"]

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
DEFAULT_SYSTEM = (
    "{% for m in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou are "
    "a helpful assistant<|im_end|>\n' }}{% endif %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + "
    "'<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3 = (
    "{{- bos_token }}{%- if not date_string is defined %}{%- if strftime_now is defined %}"
    '{%- set date_string = strftime_now("%d %b %Y") %}{%- else %}{%- set date_string = "26 Jul 2024" %}{%- endif %}'
    "{%- endif %}{%- if messages[0]['role'] == 'system' %}{%- set system_message = messages[0]['content']|trim %}"
    "{%- set messages = messages[1:] %}{%- else %}{%- set system_message = '' %}{%- endif %}"
    '{{- "<|start_header_id|>system<|end_header_id|>\n\n" }}{{- "Cutting Knowledge Date: December 2023\n" }}'
    '{{- "Today Date: " + date_string + "\n\n" }}{{- system_message }}{{- "<|eot_id|>" }}'
    "{%- for message in messages %}{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + "
    "message['content'] | trim + '<|eot_id|>' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if (message['role'] == 'assistant') %}{% set role = 'model' %}{% else %}{% set role = message['role'] %}"
    "{% endif %}{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{'<start_of_turn>model\n'}}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' ' + message['content']|trim + eos_token }}"
    "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"
)
MISTRAL_LAST = (  # the system prompt is written into the last turn, while it is the last
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] %}"
    "{% set messages = messages[1:] %}{% endif %}{% for message in messages %}{% if message['role'] == 'user' %}"
    "{% if loop.last and system is defined %}{{ '[INST] ' + system + '\n\n' + message['content'] + '[/INST]' }}"
    "{% else %}{{ '[INST] ' + message['content'] + '[/INST]' }}{% endif %}"
    "{% else %}{{ ' ' + message['content'] + eos_token }}{% endif %}{% endfor %}"
)
SILENT = (  # leaves the system prompt out without a word
    "{% for m in messages if m['role'] != 'system' %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + "
    "'<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TEMPLATES = {
    "chatml": CHATML,
    "default system": DEFAULT_SYSTEM,
    "llama 3": LLAMA3,
    "gemma": GEMMA,
    "mistral": MISTRAL,
    "mistral, system last": MISTRAL_LAST,
    "silent": SILENT,
}
FOLDED = {"gemma", "mistral", "mistral, system last", "silent"}
END = {
    "chatml": "<|im_end|>",
    "default system": "<|im_end|>",
    "llama 3": "<|eot_id|>",
    "gemma": "<end_of_turn>",
    "mistral": "</s>",
    "mistral, system last": "</s>",
    "silent": "<|im_end|>",
}
ALPHABET = "ab cdeghiklnorstuxzAHS.:,!?<>/|_[]{}%'\"\n\téß"


def finish(backend, **options):
    backend.add_special_tokens([AddedToken("<mask>", lstrip=True)])
    backend.add_tokens([AddedToken(name, special=False, normalized=False) for name in NOT_SPECIAL])
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", backend.token_to_id("<s>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>", **options
    )


def byte_level():
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    texts = ["Translate this: the house is small.\n\nGerman: Das Haus ist klein. user assistant system hello"] * 3
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        texts,
        trainers.BpeTrainer(vocab_size=400, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False),
    )
    return finish(backend)


def sentencepiece_bpe():
    """As Llama 2 and Mistral: spaces are characters of the text, and unknown characters are bytes."""
    pieces = [*SPECIAL, "<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *sorted(set(ALPHABET) - {" ", "\t"})]
    merges = [("▁", "t"), ("h", "e"), ("▁t", "he"), ("\n", "\n"), ("▁", "▁"), ("<", "/"), ("▁", "H"), ("▁H", "e")]
    vocabulary = {piece: i for i, piece in enumerate([*pieces, *("".join(merge) for merge in merges)])}
    backend = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    backend.add_special_tokens(SPECIAL)
    return finish(backend, unk_token="<unk>")


TOKENIZERS = {"byte-level": byte_level(), "sentencepiece-bpe": sentencepiece_bpe()}
by_tokenizer = pytest.mark.parametrize("kind", TOKENIZERS)
by_template = pytest.mark.parametrize("name", TEMPLATES)
texts = st.text(st.sampled_from(ALPHABET), min_size=1, max_size=12).filter(str.strip)


def tokenizer_with(template, kind="byte-level"):
    tokenizer = TOKENIZERS[kind]
    tokenizer.chat_template = template
    return tokenizer


def applied(tokenizer, messages, **options):
    """The ids that transformers gives a conversation; the date is told, so that the clock does not matter."""
    messages = [{"role": role, "content": content} for role, content in messages]
    options |= {"date_string": f"{DATE:%d %b %Y}"}
    return tuple(tokenizer.apply_chat_template(messages, **options)["input_ids"])


def conversation(name, text, system, history, source):
    """The messages that a user of transformers would give for an example."""
    user = text.replace("{source}", source)
    messages = [*((turn.role, turn.content) for turn in history), ("user", user)]
    if system is not None and name in FOLDED:
        role, first = messages[0]
        return [(role, f"{system}\n\n{first}"), *messages[1:]]
    return [("system", system), *messages] if system is not None else messages


@by_tokenizer
@by_template
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    text=st.sampled_from(["{source}", "To German: \n{source}\nGerman:", " {source} "]),
    system=st.none() | texts,
    source=texts,
    target=texts,
    turns=st.lists(st.tuples(texts, texts), max_size=2),
    apart=st.booleans(),
)
def test_prompt_and_target_are_those_of_transformers(kind, name, text, system, source, target, turns, apart):
    tokenizer = tokenizer_with(TEMPLATES[name], kind)
    history = tuple(turn for one, other in turns for turn in (Turn("user", one), Turn("assistant", other)))
    template, example = Template(text, system=system), Example(source, target, history=history)
    messages = conversation(name, text, system, history, source)
    # transformers reads the characters of a control token as the token; test_control_tokens... is about these.
    controls = {*tokenizer.all_special_tokens, *(token.content for token in tokenizer.added_tokens_decoder.values())}
    assume(not any(control in content for control in controls for content in (target, *(each for _, each in messages))))
    (prompt,) = template.encode_prompts(tokenizer, [example])
    assert prompt.prompt == applied(tokenizer, messages, add_generation_prompt=True)
    (encoded,) = template.encode(tokenizer, [example], apart=apart)
    end = tokenizer.convert_tokens_to_ids(END[name])
    assert encoded.target[-1] == end
    assert end not in encoded.target[:-1]
    whole = applied(tokenizer, [*messages, ("assistant", target)])
    last = len(whole) - whole[::-1].index(end)
    if apart:
        assert encoded.prompt == prompt.prompt
        read = tokenizer.decode(encoded.prompt + encoded.target, clean_up_tokenization_spaces=False)
        assert read == tokenizer.decode(whole[:last], clean_up_tokenization_spaces=False)
    else:
        assert encoded.prompt + encoded.target == whole[:last]
        assert encoded.prompt == prompt.prompt[: len(encoded.prompt)]
    assert encoded.source_length == len(tokenizer(source, add_special_tokens=False)["input_ids"])


PLACES = ("source", "target", "user turn", "assistant turn", "system turn", "system prompt")


def placed(place, text):
    """A template and an example with `text` in one place."""
    said = {where: text if where == place else "x" for where in PLACES}
    history = (Turn("user", said["user turn"]), Turn("assistant", said["assistant turn"]))
    if place == "system turn":
        history = (Turn("system", text), *history)
    system = said["system prompt"] if place != "system turn" else None
    return Template("To German: {source}", system=system), Example(said["source"], said["target"], history=history)


@by_tokenizer
@by_template
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("form", ["{}", "a {} b", "{}\n{}", "\n{}<|im_start|>user\nx{}", "<{}>{}|"])
def test_no_text_opens_or_closes_a_turn(kind, name, place, form):
    tokenizer = tokenizer_with(TEMPLATES[name], kind)
    controls = {tokenizer.convert_tokens_to_ids(control) for control in CONTROLS}

    def control_ids(text):
        template, example = placed(place, text)
        (encoded,) = template.encode(tokenizer, [example])
        (prompt,) = template.encode_prompts(tokenizer, [example])
        assert encoded.prompt == prompt.prompt[: len(encoded.prompt)]
        ids = encoded.prompt + encoded.target
        return [i for i in ids if i in controls], tokenizer.decode(ids, clean_up_tokenization_spaces=False)

    expected, _ = control_ids("y")
    for control in CONTROLS:
        text = form.format(control, control)
        found, read = control_ids(text)
        assert found == expected, control
        assert text.strip() in read


@by_template
def test_no_text_completes_a_control_token(name):
    """Text beside the template's own, of which a control token could be made together."""
    tokenizer = tokenizer_with(TEMPLATES[name].replace("'\n' +", "'\n<|im_' +"), "byte-level")
    controls = {tokenizer.convert_tokens_to_ids(control) for control in CONTROLS}
    counts = set()
    for text in ("start|>a", "end|>", "xstart|>"):
        (prompt,) = Template("{source}").encode_prompts(tokenizer, [text])
        counts.add(sum(i in controls for i in prompt.prompt))
    assert len(counts) == 1


@pytest.mark.skipif(
    "sanitize_control_tokens" not in inspect.signature(PreTrainedTokenizerFast.apply_chat_template).parameters,
    reason="this version of transformers does not encode control tokens in messages as text",
)
@pytest.mark.parametrize("name", ["chatml", "llama 3", "gemma"])
def test_control_tokens_in_texts_are_encoded_as_transformers_does(name):
    tokenizer = tokenizer_with(TEMPLATES[name])
    end = END[name]
    source = f"hello {end}\nuser {end}"
    (prompt,) = Template("{source}").encode_prompts(tokenizer, [source])
    sanitized = applied(tokenizer, [("user", source)], add_generation_prompt=True, sanitize_control_tokens=True)
    assert prompt.prompt == sanitized


def test_known_tokens():
    tokenizer = tokenizer_with(DEFAULT_SYSTEM)
    (found,) = Template("To German: {source}").encode(tokenizer, [Example("hello", "Hallo")])
    read = "<|im_start|>system\nYou are a helpful assistant<|im_end|>\n<|im_start|>user\nTo German: hello<|im_end|>\n"
    assert tokenizer.decode(found.prompt) == f"{read}<|im_start|>assistant\n"
    assert tokenizer.decode(found.target) == "Hallo<|im_end|>"
    assert found.source_length == len(tokenizer.tokenize("hello"))
    (system,) = Template("{source}", system="Be brief.").encode_prompts(tokenizer, ["hello"])
    assert tokenizer.decode(system.prompt).startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n")


def test_the_system_turn_of_a_conversation_takes_the_place_of_the_system_prompt():
    tokenizer = tokenizer_with(CHATML)
    example = Example("hello", "x", history=(Turn("system", "Be kind."),))
    (found,) = Template("{source}", system="Be brief.").encode_prompts(tokenizer, [example])
    assert "Be kind." in tokenizer.decode(found.prompt)
    assert "Be brief." not in tokenizer.decode(found.prompt)


@pytest.mark.parametrize("name", sorted(FOLDED))
def test_a_system_prompt_that_the_template_omits_precedes_the_first_user_turn(name):
    tokenizer = tokenizer_with(TEMPLATES[name])
    example = Example("Two", "x", history=(Turn("user", "One"), Turn("assistant", "1")))
    (found,) = Template("{source}", system="Be brief.").encode_prompts(tokenizer, [example])
    read = tokenizer.decode(found.prompt)
    assert "Be brief.\n\nOne" in read
    assert read.count("Be brief.") == 1


def test_the_header_of_an_answer_is_in_the_prompt_where_the_template_ignores_the_generation_prompt():
    tokenizer = tokenizer_with(CHATML.partition("{% if add")[0])
    (found,) = Template("{source}").encode(tokenizer, [Example("a", "\nb")])
    assert tokenizer.decode(found.prompt) == "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode(found.target) == "\nb<|im_end|>"


def test_an_empty_block_of_thoughts_is_in_the_prompt():
    thinking = CHATML.replace(
        "m['content']",
        "('<think>\n\n</think>\n\n' if loop.last and m['role'] == 'assistant' else '') + m['content']",
    )
    tokenizer = tokenizer_with(thinking)
    (found,) = Template("{source}").encode(tokenizer, [Example("a", "b")])
    assert tokenizer.decode(found.prompt).endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")
    assert tokenizer.decode(found.target) == "b<|im_end|>"
    (prompt,) = Template("{source}").encode_prompts(tokenizer, ["a"])
    assert prompt.prompt == found.prompt


def test_the_text_before_the_end_of_a_turn_belongs_to_the_target():
    tokenizer = tokenizer_with(CHATML.replace("m['content'] +", "m['content'] + ' (end)\n' +"))
    (found,) = Template("{source}").encode(tokenizer, [Example("a", "b ")])
    assert tokenizer.decode(found.target) == "b  (end)\n<|im_end|>"


def test_a_template_without_an_end_uses_the_tokenizers():
    tokenizer = tokenizer_with(
        "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
    )
    template = Template("{source}")
    (found,) = template.encode(tokenizer, [Example("a", "b \n")])
    assert tokenizer.decode(found.prompt) == "user: a\n\nassistant:"
    assert tokenizer.decode(found.target) == " b \n</s>"
    assert template.end(tokenizer) == tokenizer.eos_token_id
    assert end_of_turn(tokenizer) is None


@by_template
def test_the_end_of_a_turn_is_the_templates_own(name):
    tokenizer = tokenizer_with(TEMPLATES[name])
    assert end_of_turn(tokenizer) == tokenizer.convert_tokens_to_ids(END[name])
    assert Template("{source}").end(tokenizer) == end_of_turn(tokenizer)
    assert Template("{source}", chat=False).end(tokenizer) == tokenizer.eos_token_id


def test_the_end_of_a_turn_does_not_depend_on_the_end_of_sequence():
    """As in a GGUF file whose end of sequence is the token that opens a turn."""
    tokenizer = byte_level()
    tokenizer.chat_template, tokenizer.eos_token = CHATML, "<|im_start|>"
    (found,) = Template("{source}").encode(tokenizer, [Example("a", "b")])
    assert tokenizer.decode(found.target) == "b<|im_end|>"


def test_the_date_is_the_same_on_every_day(monkeypatch):
    tokenizer = tokenizer_with("\n  {{ strftime_now('%A, %-d. %B %Y (%y-%m-%d)') }}" + CHATML)
    (found,) = Template("{source}").encode_prompts(tokenizer, ["a"])
    assert tokenizer.decode(found.prompt).startswith("\n  Friday, 26. July 2024 (24-07-26)<|im_start|>user\na")
    assert datetime.date(2024, 7, 26) == DATE


def test_the_choice_is_automatic():
    plain = Template("To German: {source}", chat=False)
    tokenizer = tokenizer_with(None)
    assert not has_chat_template(tokenizer)
    template = Template("To German: {source}")
    assert template.settled(tokenizer) == plain
    assert template.chat_template(tokenizer) is None
    assert template.encode_prompts(tokenizer, ["a"]) == plain.encode_prompts(tokenizer, ["a"])
    before = plain.encode(tokenizer, [Example("a", "b")])
    tokenizer.chat_template = CHATML
    assert template.settled(tokenizer) == Template("To German: {source}", chat=True)
    assert len(template.chat_template(tokenizer)) == 64
    assert plain.encode(tokenizer, [Example("a", "b")]) == before
    other = template.chat_template(tokenizer)
    tokenizer.chat_template = LLAMA3
    assert template.chat_template(tokenizer) != other
    by_hand = Template("<|im_start|>user\n{source}<|im_end|>\n<|im_start|>assistant\n")
    assert by_hand.settled(tokenizer).chat is False


def test_the_source_length_is_the_length_of_a_prompt_minus_its_overhead():
    template = Template("To German: {source}\nGerman:", system="Be brief.")
    for name in TEMPLATES:
        tokenizer = tokenizer_with(TEMPLATES[name])
        overhead = template.prompt_overhead_tokens(tokenizer)
        (found,) = template.encode_prompts(tokenizer, ["The house is small."])
        assert abs(len(found.prompt) - overhead - found.source_length) <= 1


def test_a_chat_without_a_chat_template_is_refused():
    tokenizer = tokenizer_with(None)
    with pytest.raises(ConfigError, match=r"tokenizer has no chat template: leave out --chat"):
        Template("{source}", chat=True).encode_prompts(tokenizer, ["a"])
    with pytest.raises(ConfigError, match=r"the system prompt 'Be brief.' needs a chat, but .* has no chat template"):
        Template("{source}", system="Be brief.").encode_prompts(tokenizer, ["a"])
    example = Example("c", "d", "f:3", (Turn("user", "a"), Turn("assistant", "b")))
    with pytest.raises(DataError, match=r"f:3: the example has 2 earlier turns, and plain prompts have no place"):
        Template("{source}").encode(tokenizer, [example])


def test_control_tokens_in_a_template_and_a_chat_are_refused():
    tokenizer = tokenizer_with(CHATML)
    with pytest.raises(ConfigError, match=r"contains the control token '<\|im_start\|>', but in a chat"):
        Template("<|im_start|>{source}", chat=True).encode_prompts(tokenizer, ["a"])
    with pytest.raises(ConfigError, match=r"needs a chat, but the template contains the control token"):
        Template("<|im_start|>{source}", system="Be brief.").encode_prompts(tokenizer, ["a"])


@pytest.mark.parametrize(
    ("system", "chat", "message"), [(" \n", None, "is blank"), ("Be brief.", False, "needs a chat")]
)
def test_an_impossible_system_prompt_is_refused(system, chat, message):
    with pytest.raises(ConfigError, match=f"the system prompt .*{message}"):
        Template("{source}", chat, system)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('no') }}", r"refuses the turns \(no\)"),
        ("{% for m in", "refuses the turns"),
        ("{{ messages | length + 'x' }}", "refuses the turns"),
        ("nothing", "does not write every turn once"),
        ("{{ messages[0].content }}{{ messages[0].content }}", "does not write every turn once"),
        ("{{ messages[0].content }}{% if add_generation_prompt %}<think>{% else %}:{% endif %}", "as the continuation"),
        (
            "{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}"
            "{% if add_generation_prompt %}<think>{% endif %}",
            "does not write an answer as the continuation of its prompt",
        ),
        ("{% for m in messages %}{{ m.content | upper }}{% endfor %}", "does not write every turn once"),
    ],
)
def test_a_chat_template_that_cannot_be_used_is_refused(template, message):
    tokenizer = tokenizer_with(template)
    with pytest.raises(ConfigError, match=rf"chat template of the PLM's tokenizer .*{message}.*: use plain prompts"):
        Template("{source}").encode_prompts(tokenizer, ["a"])
    assert end_of_turn(tokenizer) is None
    assert Template("{source}", chat=False).encode_prompts(tokenizer, ["a"])


def test_several_chat_templates_need_a_default():
    tokenizer = tokenizer_with({"default": CHATML, "tool_use": LLAMA3})
    assert end_of_turn(tokenizer) == tokenizer.convert_tokens_to_ids("<|im_end|>")
    tokenizer.chat_template = {"one": CHATML, "other": LLAMA3}
    with pytest.raises(ConfigError, match="several chat templates and no default one"):
        Template("{source}").encode_prompts(tokenizer, ["a"])


def test_turns_that_the_template_refuses_are_named():
    tokenizer = tokenizer_with(GEMMA)
    example = Example("b", "c", "talk.jsonl:4", (Turn("user", "a"),))
    with pytest.raises(DataError, match=r"talk.jsonl:4: .*roles must alternate.*the turns are user, user\)"):
        Template("{source}").encode(tokenizer, [example])


def test_a_template_that_ends_answers_differently_is_refused():
    tokenizer = tokenizer_with(CHATML.replace("'<|im_end|>'", "('</s>' if loop.index > 3 else '<|im_end|>')"))
    example = Example("b", "c", "f:4", (Turn("user", "a"), Turn("assistant", "a")))
    with pytest.raises(DataError, match=r"f:4: .*does not end every answer in the same way"):
        Template("{source}").encode(tokenizer, [example])


def test_a_target_that_tokenises_to_nothing_is_named():
    tokenizer = byte_level()
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("\u200b", "")
    tokenizer.chat_template = CHATML
    with pytest.raises(DataError, match=r"f:1: the target '\\u200b' tokenises to nothing"):
        Template("{source}").encode(tokenizer, [Example("a", "\u200b", "f:1")])


def test_a_tokenizer_that_cannot_be_copied_refuses_control_tokens_in_every_text():
    tokenizer = ByT5Tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = CHATML
    (found,) = Template("{source}").encode(tokenizer, [Example("a", "b")])
    assert found.prompt + found.target == applied(tokenizer, [("user", "a"), ("assistant", "b")])[: -len("\n")]
    for place in PLACES:
        template, example = placed(place, "a <|im_end|>")
        with pytest.raises(DataError, match=rf"{place}: '<\|im_end\|>' is a control token"):
            template.encode(tokenizer, [example])
