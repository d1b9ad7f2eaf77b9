"""A PLM on SGLang's server, against a server in the process that is made after SGLang's source."""

import dataclasses

import pytest
from engine_plm import D, build_plm
from fake_sglang import URL, FakeSGLang, connect, same
from scenes import STEPS, TEXTS, predicted, sequences, session, teacher

import pema
from pema.errors import ConfigError, DataError, MismatchError, OwnerError
from pema.owner.head import Head
from pema.owner.opening import open_plm


def changed(**fields):
    return lambda value: value | {"meta_info": value["meta_info"] | fields}


@pytest.fixture
def server(local):
    return FakeSGLang(local)


@pytest.fixture(params=["bundle", "folder"])
def plm(request, server):
    return connect(server, request.getfixturevalue(request.param))


def test_contexts_and_sessions_are_those_of_transformers(plm, local):
    assert plm.deviation < 1e-4
    for ours, theirs in zip(teacher(plm), teacher(local), strict=True):
        same(ours, theirs)
    for (f, tokens), (g, others) in zip(predicted(plm), predicted(local), strict=True):
        assert tokens.tolist() == others.tolist()
        same(f, g)
    for ours, theirs in zip(session(plm), session(local), strict=True):
        same(ours, theirs)


def test_one_request_for_each_example(plm, server):
    server.asked.clear()
    teacher(plm)
    assert [body["input_ids"] for body in server.generated()] == [tokens[:-1] for tokens in sequences(plm)]
    server.asked.clear()
    predicted(plm)
    assert [body["sampling_params"]["max_new_tokens"] for body in server.generated()] == list(STEPS)


def test_answers_of_a_build_do_not_depend_on_the_cache(plm, server):
    assert server.seen
    before = teacher(plm)
    server.seen.clear()
    for a, b in zip(before, teacher(plm), strict=True):
        assert a.equal(b)


def test_a_step_computes_what_is_not_in_the_cache(plm, server):
    opened = plm.open_session(sequences(plm)[:1])
    opened.advance([70])
    (body,) = server.generated()[-1:]
    assert body["logprob_start_len"] == -1
    assert server.cached(body["input_ids"], body) == len(body["input_ids"]) - 1


def test_a_text_ends_at_its_end(server, bundle):
    plm = connect(server, bundle)
    (part,) = plm.predict(sequences(plm)[:1], [6])
    whole = part.generated.tolist()
    plm._at_hand = dataclasses.replace(plm._at_hand, ends=(whole[2],))
    (part,) = plm.predict(sequences(plm)[:1], [6])
    assert part.generated.tolist() == whole[: whole.index(whole[2]) + 1]
    assert len(part.representations) == len(part.generated)


@pytest.mark.parametrize(
    ("settings", "error", "match"),
    [
        (
            {"vectors": "off"},
            OwnerError,
            rf"{URL} does not return hidden states \(.*not configured to return hidden states.*\): start it with "
            "--enable-return-hidden-states",
        ),
        ({"vectors": "unit"}, MismatchError, "these vectors are normalised to one length"),
        (
            {"chunk": 8},
            OwnerError,
            rf"{URL} reads \d+ tokens in parts and returns the first only: start it with --chunked-prefill-size -1",
        ),
        ({"stale": True}, MismatchError, r"answers differently in steps: the deviation is \d+%, at most 10% is accep"),
    ],
)
def test_a_server_that_returns_something_else(local, bundle, settings, error, match):
    with pytest.raises(error, match=match):
        connect(FakeSGLang(local, **settings), bundle)


def test_vectors_before_the_norm(local, folder, bundle):
    server = FakeSGLang(local, vectors="before norm")
    with pytest.raises(MismatchError, match=r"does not fit the LM head of tiny.*these are vectors before the final no"):
        connect(server, folder)
    with pytest.raises(MismatchError, match=r"differs from the engine's own log-probabilities by \d+%"):
        connect(server, bundle)


def test_another_model(folder):
    with pytest.raises(MismatchError, match="the engine runs another model, or another file of it"):
        connect(FakeSGLang(build_plm(5)), folder)


def test_a_server_that_always_uses_its_cache(local, bundle):
    match = rf"{URL} gives 25 vectors for 26 tokens, the others are in its cache: start it with --disable-radix-cache"
    with pytest.raises(OwnerError, match=match):
        teacher(connect(FakeSGLang(local, always=True), bundle))


def test_a_model_with_more_tokens(local, bundle, tmp_path):
    Head(local.head().weight[:259]).save(tmp_path / "head")
    local.tokenizer.save_pretrained(tmp_path / "head")
    top = [[[-float(n), 263 - n, None] for n in range(259)]]
    server = FakeSGLang(local, answers={"/generate": changed(output_top_logprobs=top)})
    with pytest.raises(
        MismatchError, match=r"another model than head: it has token 263, outside the vocabulary of 259"
    ):
        connect(server, tmp_path / "head")


def test_another_tokenizer(local, bundle):
    server = FakeSGLang(local, answers={"/tokenize": lambda value: value | {"tokens": [*value["tokens"], 9]}})
    with pytest.raises(MismatchError, match=f"{URL} has another tokenizer: of 'Two words"):
        connect(server, bundle)


def test_a_context_that_is_too_long(plm):
    with pytest.raises(DataError, match=r"sequence 0 has 128 tokens, the PLM's context window holds 127"):
        list(plm.represent([[1] * 128], [1]))


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda value: b"<html>", "answered with something that is not JSON: check that SGLang's server runs there"),
        (lambda value: {}, "answered without tokens, probabilities or vectors of 16 numbers"),
        (changed(hidden_states=[]), "answered without tokens, probabilities or vectors of 16 numbers"),
        (changed(hidden_states=[[[0.0] * D] * 5]), "reads 11 tokens in parts"),
        (
            changed(hidden_states=[[[0.0] * (D // 2)] * 22]),
            "answered without tokens, probabilities or vectors of 16 numbers",
        ),
        (changed(output_token_logprobs=[]), "answered without tokens, probabilities"),
        (changed(hidden_states=[[[float("inf")] * D] * 11]), "answered without tokens, probabilities"),
    ],
)
def test_answers_that_no_such_server_gives(plm, server, change, match):
    server.answers["/generate"] = change
    with pytest.raises(OwnerError, match=match):
        list(plm.represent([[1, *range(60, 71)]], [1]))


def test_fewer_log_probabilities_than_requested(local, bundle):
    few = {"/generate": changed(output_top_logprobs=[[[-1.0, 5, None]]])}
    with pytest.raises(OwnerError, match="answered without tokens, probabilities or vec"):
        connect(FakeSGLang(local, answers=few), bundle)


TASK = pema.Task("letters", pema.Template("{source} ="), ("bleu",), "")


def test_an_adapter_that_is_built_and_used_through_it(plm, local, tmp_path):
    examples = [pema.Example(text, text[::-1]) for text in TEXTS]
    texts = {}
    for name, each in (("sglang", plm), ("transformers", local)):
        memory = pema.build_memory(each, examples, TASK, tmp_path / name, contexts="teacher", dtype="float32")
        adapter, _ = pema.train(memory, pema.TrainConfig(rank=8, epochs=4, learning_rate=0.01), tmp_path / f"{name}-a")
        texts[name] = pema.generate(each, adapter, TEXTS, TASK, pema.Constant(0.9), max_new_tokens=6)
    assert texts["sglang"] == texts["transformers"]


def test_the_description_names_the_engine(plm, local):
    about = plm.description
    assert (about.architecture, about.weights, about.max_length) == ("SGLang", "run by SGLang", 127)
    assert about.tokenizer_fingerprint == local.description.tokenizer_fingerprint
    assert about.fingerprint != local.description.fingerprint


def test_settings_that_the_engine_chooses(bundle):
    with pytest.raises(ConfigError, match="dtype=float32 is chosen by the engine that runs the PLM: omit it"):
        open_plm(f"sglang+{URL}#{bundle}", dtype="float32")
