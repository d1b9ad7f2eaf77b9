"""An API beside a proxy: representations at the borders of the API's tokens, its head, proposals, and the mixture."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pema.adapter.config import AdapterConfig
from pema.adapter.copying import context_tokens
from pema.adapter.module import Adapter
from pema.adapter.schedule import Constant, GradualUnrolling, NoAdapter
from pema.errors import ConfigError, DataError, MismatchError, OwnerError
from pema.generation.decoding import generate_counted
from pema.generation.mixture import mix
from pema.generation.proposed import choose, is_certain
from pema.owner.local import LocalPLM
from pema.owner.openai_api.answers import Named
from pema.owner.openai_api.following import TextFollower
from pema.owner.openai_api.reading import Reading
from pema.owner.openai_api.vocabulary import ROLES, Vocabulary
from pema.tasks.encoding import Encoding
from pema.tasks.example import Example, Turn
from pema.tasks.registry import Task
from pema.tasks.spelling import speller_of
from pema.tasks.template import Template
from tiny import EOS, build_model, build_tokenizer

TASK = Task("say", Template("Say {source} ="), (), "")
SOURCES = ["the house", "a cat and a dog"]


def encoded(plm, target="one house, two cats é🏠."):
    examples = [Example(source, target) for source in SOURCES]
    return TASK.template.settled(plm.tokenizer).encode(plm.tokenizer, examples)


@pytest.mark.parametrize("endpoint", ["completions", "chat"])
def test_representations_are_the_proxys_of_the_text_of_each_context(sold, proxy, endpoint):
    plm = sold[1](endpoint=endpoint)
    assert plm.tokenizer.get_vocab() != proxy.tokenizer.get_vocab()
    examples = encoded(plm)
    sequences = [[*each.prompt, *each.target] for each in examples]
    starts = [len(each.prompt) for each in examples]
    answers = sorted(plm.represent(sequences, starts), key=lambda each: each.index)
    encode = Encoding(proxy.tokenizer)
    for example, answer in zip(examples, answers, strict=True):
        assert len(answer.representations) == len(example.target)
        text = plm._vocabulary.text(example.prompt)
        begin = encode.begin([text + "\n\n" if endpoint == "chat" else text])[0]
        for n, row in enumerate(answer.representations):
            written = b"".join(plm._vocabulary.contents[t] for t in example.target[:n]).decode("utf-8", "ignore")
            context = [*begin, *encode.encode([written])[0]]
            (alone,) = proxy.represent([[*context, 0]], [len(context)])
            torch.testing.assert_close(row, alone.representations[0], rtol=1e-4, atol=1e-5)
    assert not sold[0].requests


def test_examples_that_are_skipped_are_left_out_and_change_nothing(sold):
    plm = sold[1]()
    examples = encoded(plm)
    sequences, starts = [[*each.prompt, *each.target] for each in examples], [len(each.prompt) for each in examples]
    whole = {each.index: each.representations for each in plm.represent(sequences, starts)}
    part = {each.index: each.representations for each in plm.represent(sequences, starts, skip=frozenset({0}))}
    assert part.keys() == {1}
    assert torch.equal(part[1], whole[1])


def test_the_head_has_the_mean_of_the_rows_of_a_tokens_text(sold, proxy):
    plm = sold[1]()
    head, own, encode = plm.head(), proxy.head().weight, Encoding(proxy.tokenizer)
    assert head.vocabulary_size == len(plm.tokenizer)
    kinds = set()
    for token, content in enumerate(plm._vocabulary.contents):
        if token == EOS:
            expected = own[proxy.description.eos_token_ids[-1]]
        elif content and not content.decode("utf-8", "replace").count("\ufffd"):
            ids = encode.encode([content.decode()])[0]
            kinds.add(len(ids) > 1)
            expected = own[list(ids)].mean(0)
        else:
            expected = own.mean(0)
        torch.testing.assert_close(head.weight[token], expected)
    assert kinds == {True, False}
    assert plm.description.head_fingerprint == sold[1]().description.head_fingerprint  # kept in the cache


def test_the_description_depends_on_tokenizer_proxy_and_endpoint_and_not_on_the_model(sold):
    one, other = sold[1]().description, sold[1](endpoint="chat").description
    assert sold[1](block=3).description == one
    assert other.fingerprint != one.fingerprint
    assert one.vocabulary_size == len(build_tokenizer())
    assert one.eos_token_ids == (EOS,)


def test_a_chat_is_read_back_from_its_tokens(tokens):
    vocabulary = Vocabulary.load(str(tokens), "chat")
    template = Template("Say {source}", system="Be <|brief|>.").settled(vocabulary.tokenizer)
    example = Example("x", "</s> y", history=(Turn("user", "a\n"), Turn("assistant", "b</s>"), Turn("user", "c")))
    example = Example("x", "y", history=(Turn("user", "a"), Turn("assistant", "b é")))
    (one,) = template.encode(vocabulary.tokenizer, [example])
    turns = (Turn("system", "Be <|brief|>."), Turn("user", "a"), Turn("assistant", "b é"), Turn("user", "Say x"))
    assert vocabulary.prompt(one.prompt) == turns
    assert vocabulary.text(one.target) == "y"
    assert one.target[-1] == vocabulary.end
    assert list(vocabulary.tokenizer.convert_ids_to_tokens(one.prompt)).count(ROLES["user"]) == 2


def test_control_tokens_of_a_plain_template_are_refused(tokens):
    vocabulary = Vocabulary.load(str(tokens), "completions")
    (one,) = Template("Say <pad> {source}").encode_prompts(vocabulary.tokenizer, ["x"])
    with pytest.raises(DataError, match="a prompt contains the control token '<pad>', which the API reads as text"):
        vocabulary.prompt(one.prompt)


def test_tokens_are_found_by_their_bytes_names_and_numbers(tokens):
    vocabulary = Vocabulary.load(str(tokens), "completions")
    for token, content in enumerate(vocabulary.contents):
        if content:
            assert vocabulary.find(Named("x", content)) == token
            assert vocabulary.find(Named("x", content, token)) == token
            assert vocabulary.find(Named("x", content, 0)) is None
    assert vocabulary.find(Named("</s>", b"")) == EOS
    assert vocabulary.find(Named("", b"")) == EOS
    assert vocabulary.find(Named("<|other|>", b"")) is None
    assert vocabulary.find(Named("x", b"no such token")) is None


def test_tokens_that_an_api_gives_together_are_split(tokens):
    """As llama.cpp gives the bytes of a character, with the number of the last token."""
    vocabulary = Vocabulary.load(str(tokens), "completions")
    parts = vocabulary.tokenizer("🏠", add_special_tokens=False).input_ids
    content = b"".join(vocabulary.contents[part] for part in parts)
    assert vocabulary.split(Named("🏠", content, parts[-1])) == parts
    assert vocabulary.split(Named("🏠", content)) == []
    assert vocabulary.split(Named("x", b"x")) == [vocabulary.find(Named("x", b"x"))]
    assert vocabulary.split(Named("x", b"\xff\xfex", 10**6)) == []


def adapter_for(plm, copy_width=0, scale=6.0):
    """An adapter with large random weights, so that it is sure of some tokens."""
    description = plm.description
    config = AdapterConfig(
        d=description.d,
        vocabulary_size=description.vocabulary_size,
        rank=8,
        residual=True,
        activation="gelu",
        copy_width=copy_width,
        plm=description,
        max_new_tokens=12,
    )
    adapter = Adapter(config, seed=5)
    with torch.no_grad():
        torch.manual_seed(0)
        adapter.B_pd.normal_(0, scale)
    return adapter.eval()


def slow(fake, plm, adapter, schedule, source, limit=12, k=20):
    """One token at a time, each from the whole distribution of the model with only its top k left."""
    (prompt,) = TASK.template.settled(plm.tokenizer).encode_prompts(plm.tokenizer, [source])
    written, head = [], plm.head()
    while len(written) < limit and EOS not in written:
        ids = [*prompt.prompt, *written]
        (answer,) = plm.represent([[*ids, 0]], [len(ids)])
        tokens = None
        if adapter.copying is not None:
            tokens = context_tokens(speller_of(plm.tokenizer), [prompt.prompt], [written], (0, 0))
        pema = adapter.log_probs(answer.representations, head, tokens)[0].double()
        text = plm._vocabulary.text(ids)
        log_p = fake.log_p(fake.plm.tokenizer(text).input_ids)
        top = log_p.topk(k)
        api = torch.full_like(pema, float((1 - top.values.exp().sum()) / (len(pema) - k))).log()
        api[top.indices] = top.values
        weight = schedule.weights(torch.tensor([len(written)]), torch.tensor([prompt.source_length]))
        if plm._vocabulary.last_border(written) < len(written):  # a part of a character: the API knows nothing
            weight = torch.ones(1)
        written.append(int(mix(api[None], pema[None], weight)[0].argmax()))
    return written


@pytest.mark.parametrize(
    ("schedule", "copy_width"), [(Constant(0.4), 0), (Constant(1.0), 4), (GradualUnrolling(0.8), 4)]
)
def test_texts_are_those_of_the_mixture_one_token_at_a_time(sold, schedule, copy_width):
    fake, opened = sold
    plm = opened(block=5, parallel=2)
    adapter = adapter_for(plm, copy_width)
    expected = [slow(fake, plm, adapter, schedule, source) for source in SOURCES]
    result = generate_counted(plm, adapter, SOURCES, TASK, schedule)
    texts = [plm._vocabulary.text([t for t in row if t != EOS]).strip() for row in expected]
    assert result.texts == texts
    assert result.tokens == sum(map(len, expected))


def test_requests_are_saved_where_the_block_is_right_or_the_adapter_is_sure(sold, capsys):
    fake, opened = sold
    adapter = adapter_for(opened())
    texts, counts = set(), []
    for n, block in enumerate((1, 3, 10)):
        plm = opened(block=block, cache=opened()._config.cache.with_name(f"{n}.sqlite"))
        result = generate_counted(plm, adapter, SOURCES, TASK, Constant(0.03))
        texts.add(tuple(result.texts))
        counts.append(len(fake.requests))
        fake.requests.clear()
        assert f": {counts[-1]} requests with " in capsys.readouterr().err.replace("\n", " ")
    assert len(texts) == 1
    assert counts[0] > counts[1] > counts[2]
    sure = generate_counted(opened(), adapter, SOURCES, TASK, Constant(1.0))
    assert sure.tokens
    assert not fake.requests


def test_the_api_alone_is_asked_once_a_text(sold):
    fake, opened = sold
    plm = opened()
    result = generate_counted(plm, None, SOURCES, TASK, max_new_tokens=10)
    assert len(fake.requests) == len(SOURCES)
    prompts = [{"prompt": f"Say {source} ="} for source in SOURCES]
    for text, prompt in zip(result.texts, prompts, strict=True):
        written = ""
        for _ in range(10):
            token = int(fake.log_p(fake.ids(prompt, written)).argmax())
            if token == EOS:
                break
            written += plm._vocabulary.text([token])
        assert text == written.strip()
    adapter = adapter_for(plm)
    assert generate_counted(plm, adapter, SOURCES, TASK, NoAdapter(), max_new_tokens=10).texts == result.texts


@given(st.integers(0, 10_000), st.floats(0, 1), st.integers(1, 6))
def test_a_token_is_certain_only_if_no_distribution_changes_it_and_the_choice_is_the_mixtures(seed, weight, k):
    random = torch.Generator().manual_seed(seed)
    log_pema = torch.log_softmax(3 * torch.randn(12, generator=random), -1)
    p_api = torch.softmax(3 * torch.randn(12, generator=random).double(), -1)
    best = p_api.topk(k)
    top = [(int(i), float(p.log())) for i, p in zip(best.indices, best.values, strict=True)]
    kept = torch.full_like(p_api, float((1 - best.values.sum()) / (12 - k)))
    kept[best.indices] = best.values
    mixture = weight * log_pema.exp().double() + (1 - weight) * kept
    chosen = choose(log_pema, weight, top)
    assert float(mixture[chosen]) >= float(mixture.max()) - 1e-6
    if is_certain(log_pema, weight):
        assert chosen == int(log_pema.argmax())
        rival = int(log_pema.topk(2).indices[1])
        assert choose(log_pema, weight, [(rival, 0.0)]) == chosen
    elif weight < 1:
        rival = int(log_pema.topk(2).indices[1])
        ahead = weight * float(log_pema.exp().max() - log_pema.exp()[rival])
        assert ahead <= 1 - weight + 1e-6


def test_without_any_of_the_apis_tokens_the_adapter_decides():
    assert choose(torch.tensor([0.1, 0.7, 0.2]).log(), 0.1, ()) == 1


def test_a_text_ends_where_the_proxys_window_is_full(sold, proxy):
    plm = sold[1](block=12)
    source = "the house and the dog " * 6
    adapter = adapter_for(plm, scale=1.0)
    result = generate_counted(plm, adapter, [source], TASK, Constant(0.1), max_new_tokens=100)
    assert result.finish_reasons == ["length"]
    assert 0 < result.tokens < 100
    whole = Encoding(proxy.tokenizer).begin([f"Say {source.strip()} ="])[0]
    written = Encoding(proxy.tokenizer).encode([result.texts[0]])[0]
    assert len(whole) + len(written) > proxy.description.max_length - 12


def test_a_character_in_parts_is_asked_for_as_a_whole(sold):
    fake, opened = sold
    plm = opened()
    (prompt,) = TASK.template.settled(plm.tokenizer).encode_prompts(plm.tokenizer, ["x"])
    house = plm.tokenizer("🏠", add_special_tokens=False).input_ids
    assert len(house) > 1
    proposal = plm.propose(prompt.prompt, house[:1], 3)
    assert fake.requests[0][1]["prompt"] == "Say x ="
    assert fake.requests[0][1]["max_tokens"] == 4
    assert proposal.tokens == ()  # the model writes something else there
    assert len(plm.propose(prompt.prompt, house, 3).tokens) == 3
    assert fake.requests[1][1]["prompt"] == "Say x =🏠"


@pytest.mark.parametrize("says_end", [True, False])
def test_the_end_of_a_text_is_proposed_with_or_without_its_probability(sold, monkeypatch, says_end):
    fake, opened = sold
    fake.says_end = says_end
    ending = torch.full((len(fake.plm.tokenizer),), -9.0, dtype=torch.float64)
    ending[EOS] = -0.5
    monkeypatch.setattr(fake, "log_p", lambda ids: ending)
    plm = opened()
    (prompt,) = TASK.template.settled(plm.tokenizer).encode_prompts(plm.tokenizer, ["x"])
    proposal = plm.propose(prompt.prompt, (), 3)
    assert proposal.tokens == (EOS,)
    assert proposal.top[0][0] == (EOS, -0.5 if says_end else 0.0)
    assert generate_counted(plm, None, ["x"], TASK).finish_reasons == ["eos_token"]


def test_a_chat_api_that_continues_a_reply_is_used_and_one_that_does_not_is_refused(sold):
    fake, opened = sold
    plm = opened(endpoint="chat")
    adapter = adapter_for(plm, scale=2.0)
    assert generate_counted(plm, adapter, SOURCES, TASK, Constant(0.2)).tokens
    assert any(request["messages"][-1]["role"] == "assistant" for _, request in fake.requests)
    fake.continues = False
    another = opened(endpoint="chat", cache=plm._config.cache.with_name("b.sqlite"))
    with pytest.raises(OwnerError, match=r"does not continue a reply that was begun: after '.*Use endpoint='compl"):
        generate_counted(another, adapter, SOURCES, TASK, Constant(0.2))


def test_another_tokenizer_is_refused_at_the_first_answers(sold, tmp_path):
    _, opened = sold
    build_tokenizer(vocab_size=270).save_pretrained(tmp_path / "other")
    plm = opened(tokenizer=str(tmp_path / "other"))
    with pytest.raises(MismatchError, match=r"has another tokenizer than .*other|wrote the token '.*does not have"):
        generate_counted(plm, None, ["x", "the house and the dog " * 8, *SOURCES], TASK, max_new_tokens=3)


def test_counts_that_differ_between_prompts_are_refused(sold):
    fake, opened = sold

    def counted(body):
        body["usage"]["prompt_tokens"] *= 2
        return body

    fake.change = counted
    with pytest.raises(MismatchError, match=r"it counts \d+, \d+ tokens, the tokenizer \d+, \d+\. Name the model's"):
        generate_counted(opened(parallel=1), None, ["x", "the house and the dog " * 4], TASK, max_new_tokens=3)


@pytest.mark.parametrize("setting", [{"num_beams": 2}, {"do_sample": True}, {"repetition_penalty": 1.2}])
def test_what_needs_all_probabilities_is_refused_by_name(sold, setting):
    (name,) = setting
    with pytest.raises(ConfigError, match=f"{name}=.* needs the probabilities of all tokens"):
        generate_counted(sold[1](), None, SOURCES, TASK, **setting)


def test_what_an_api_cannot_do_is_refused_by_name(sold):
    plm = sold[1]()
    for call in (
        lambda: plm.model,
        lambda: plm.generator,
        lambda: plm.predict([[1, 5]], [3]),
        lambda: plm.open_session([[1, 5]]),
    ):
        with pytest.raises(OwnerError, match="closed is an API that gives its 20 likeliest tokens only, and"):
            call()


def test_an_adapter_of_another_plm_is_refused(sold, proxy):
    with pytest.raises(MismatchError, match="belongs to another PLM"):
        generate_counted(sold[1](), adapter_for(proxy), SOURCES, TASK)


def test_an_answer_with_nothing_in_it_is_refused(sold):
    fake, opened = sold

    def empty(body):
        body["choices"][0] |= {"logprobs": {"content": []}, "finish_reason": "length"}
        body["usage"]["completion_tokens"] = 0
        return body

    fake.change = empty
    with pytest.raises(OwnerError, match="answered with nothing, and did not say that its text ended"):
        generate_counted(opened(), None, ["x"], TASK)


def test_a_budget_that_ends_in_a_text_loses_nothing(sold):
    fake, opened = sold
    adapter = adapter_for(opened())
    whole = generate_counted(opened(cache=opened()._config.cache.with_name("c")), adapter, SOURCES, TASK, Constant(0.3))
    needed = len(fake.requests)
    with pytest.raises(OwnerError, match="could exceed the budget max_requests=2"):
        generate_counted(opened(max_requests=2), adapter, SOURCES, TASK, Constant(0.3))
    assert len(fake.requests) == needed + 2
    again = generate_counted(opened(max_requests=needed), adapter, SOURCES, TASK, Constant(0.3))
    assert again.texts == whole.texts
    assert len(fake.requests) == 2 * needed


class Counted:
    """A proxy that counts its sessions."""

    def __init__(self, proxy):
        self.proxy, self.sessions, self.description = proxy, 0, proxy.description

    def open_session(self, prompts):
        self.sessions += len(prompts)
        return self.proxy.open_session(prompts)


@pytest.mark.parametrize(("tokens_of_api", "tokens_of_proxy"), [(320, 290), (270, 320)])
def test_texts_that_grow_are_read_once_and_as_in_a_plain_pass(tokens_of_api, tokens_of_proxy):
    """Only if the proxy has words that the API writes in parts, its last token becomes another one."""
    model = build_model("llama", seed=1, vocab_size=tokens_of_proxy)
    proxy = Counted(LocalPLM(model, build_tokenizer(vocab_size=tokens_of_proxy)))
    reading = Reading(proxy.proxy, Vocabulary(build_tokenizer(vocab_size=tokens_of_api), "completions"))
    prompts, targets = zip(*((each.prompt, each.target) for each in encoded(reading._vocabulary)), strict=True)
    sequences, starts = [[*p, *t] for p, t in zip(prompts, targets, strict=True)], list(map(len, prompts))
    plain = {each.index: each.representations for each in reading.represent(sequences, starts, 8192, frozenset())}
    tokens = [reading.written([target[:n] for n in range(len(target))]) for target in targets]
    renewed = sum(after[: len(before)] != before for text in tokens for before, after in itertools.pairwise(text))
    assert (renewed > 0) == (tokens_of_api < tokens_of_proxy)
    follower = TextFollower(proxy, reading, prompts)
    for n in range(max(map(len, targets))):
        written = {i: target[:n] for i, target in enumerate(targets) if n < len(target)}
        reached = follower.reach(written)
        assert set(reached) == set(follower._texts) == set(written)  # a text that has ended is forgotten
        for i, f in reached.items():
            torch.testing.assert_close(f, plain[i][n], rtol=1e-4, atol=1e-5)
    assert proxy.sessions == 2 + renewed
    follower.close()
    assert not follower._texts


def test_a_context_that_fills_the_window_is_not_reached(sold, proxy):
    plm = sold[1]()
    (prompt,) = TASK.template.settled(plm.tokenizer).encode_prompts(plm.tokenizer, ["x"])
    word = tuple(plm.tokenizer(" house", add_special_tokens=False).input_ids)
    begun = len(plm._reading.prompt(prompt.prompt))
    most = next(n for n in range(200) if begun + len(plm._reading.written([word * n])[0]) >= proxy.max_length)
    follower = TextFollower(proxy, plm._reading, [prompt.prompt])
    assert set(follower.reach({0: word * (most - 1)})) == {0}
    assert follower.reach({0: word * most}) == {}
