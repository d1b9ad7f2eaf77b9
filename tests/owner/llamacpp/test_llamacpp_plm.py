"""A PLM on an engine that answers as llama.cpp's server does: representations, sessions, requests."""

from dataclasses import replace

import pytest
import torch
from engines import FakeEngine, connect

import pema
from pema.errors import ConfigError, DataError
from pema.owner.contract import PLMDescription
from pema.owner.local import LocalPLM
from pema.owner.opening import open_plm
from pema.tasks.example import Example

EXACT = {"rtol": 1e-4, "atol": 1e-5}


@pytest.fixture(scope="module", params=["plain", "none"])
def plm(request, files, local):
    """With vectors, and with log-probabilities only."""
    return connect(files["F32"], FakeEngine(local, vectors=request.param))


def ordered(parts):
    return sorted(parts, key=lambda part: part.index)


def test_teacher_contexts_are_those_of_the_model(plm, local, texts):
    starts = [3, 1, 2]
    ours, theirs = ordered(plm.represent(texts, starts)), ordered(local.represent(texts, starts))
    assert [part.index for part in ours] == [0, 1, 2]
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.representations, b.representations, **EXACT)
        assert a.generated is None
    assert [part.index for part in plm.represent(texts, starts, skip=frozenset({0, 2}))] == [1]


def test_predicted_contexts_are_those_of_the_model(plm, local, texts):
    steps = [5, 1, 8]
    ours, theirs = ordered(plm.predict(texts, steps)), ordered(local.predict(texts, steps))
    for a, b in zip(ours, theirs, strict=True):
        assert a.generated.tolist() == b.generated.tolist()
        torch.testing.assert_close(a.representations, b.representations, **EXACT)


def test_a_predicted_text_ends_with_the_end_of_the_text(files, local, texts):
    (whole,) = local.predict(texts[:1], [6])
    tokens = whole.generated.tolist()
    plm = connect(files["F32"], FakeEngine(local))
    vars(plm)["description"] = replace(plm.description, eos_token_ids=(tokens[2],))
    (ended,) = plm.predict(texts[:1], [6])
    assert ended.generated.tolist() == tokens[: tokens.index(tokens[2]) + 1]
    assert len(ended.representations) == len(ended.generated)


def test_a_session_follows_the_model_with_beams(plm, local, texts):
    ours, theirs = plm.open_session(texts), local.open_session(texts)
    for tokens, parents in (([7, 8, 9], None), ([5, 6], [2, 2]), ([11, 12, 13], [1, 0, 1]), ([4], [1])):
        ours.advance(tokens, parents)
        theirs.advance(tokens, parents)
        torch.testing.assert_close(ours.representations, theirs.representations, **EXACT)
    assert ours.held_bytes > 0
    ours.close()
    ours.close()
    assert ours.held_bytes == 0
    with pytest.raises(DataError, match="the session is closed: open another"):
        ours.advance([1])


def test_only_the_first_request_of_a_session_ignores_what_the_engine_keeps(files, local, texts):
    engine = FakeEngine(local)
    session = connect(files["F32"], engine).open_session(texts[:1])
    session.advance([7])
    session.advance([8])
    cached = [body["cache_prompt"] for path, body in engine.asked if path == "/completion"][-3:]
    assert cached == [False, True, True]


def test_long_sequences_are_read_token_by_token(files, local, texts, capsys):
    engine = FakeEngine(local, batch=50)
    plm = connect(files["F32"], engine)
    long = [*texts[0], *texts[1][1:]] * 4
    assert 128 > len(long) > 50 > len(texts[2])
    parts = ordered(plm.represent([long, long, texts[2]], [50, len(long) - 5, 2]))
    for part, expected in zip(
        parts, ordered(local.represent([long, long, texts[2]], [50, len(long) - 5, 2])), strict=True
    ):
        torch.testing.assert_close(part.representations, expected.representations, **EXACT)
    said = capsys.readouterr().err
    assert said.count("gives no vectors for") == 1
    assert "longer sequences are read token by token" in said
    refused = [body for path, body in engine.asked if path == "/embedding" and len(body["content"]) > 50]
    assert len(refused) == 1  # it is not asked again


def test_requests_set_all_that_decides_their_answer(files, local, texts):
    engine = FakeEngine(local)
    plm = connect(files["F32"], engine)
    list(plm.predict(texts[:1], [2]))
    plm.open_session(texts[:1])
    for path, body in engine.asked:
        if path == "/completion":
            assert {"samplers", "top_k", "logit_bias", "n_probs", "cache_prompt", "stop", "n_predict"} <= set(body)
        if path == "/embedding":
            assert body["embd_normalize"] == -1


def test_the_description_and_the_head_are_those_of_the_file(files, local):
    plm = connect(files["F32"], FakeEngine(local))
    about, theirs = plm.description, LocalPLM.load(files["F32"]).description
    assert about.fingerprint != theirs.fingerprint
    for name in ("tokenizer_fingerprint", "head_fingerprint", "d", "vocabulary_size", "eos_token_ids"):
        assert getattr(about, name) == getattr(theirs, name), name
    assert about.parameters == theirs.parameters
    assert about.weights == "GGUF in float32, run by llama.cpp"
    assert about.architecture == "llama.cpp llama"
    assert PLMDescription.from_dict(about.to_dict()) == about
    assert connect(files["F32"], FakeEngine(local), name="another").description.fingerprint == about.fingerprint
    assert plm.deviation < 1e-4


def test_the_context_is_the_smaller_of_model_and_server(files, local):
    answers = {"/props": lambda value: {"default_generation_settings": {"n_ctx": 77}}}
    assert connect(files["F32"], FakeEngine(local, answers=answers)).description.max_length == 76


def test_a_memory_an_adapter_and_texts(plm, local, tmp_path):
    examples = [Example("the house", "das Haus"), Example("the dog", "der Hund"), Example("a cat", "eine Katze")]
    task = pema.get_task("translation")
    memories = [pema.build_memory(each, examples, task, tmp_path / str(n)) for n, each in enumerate((plm, local))]
    views = [next(memory.view().batches(64)) for memory in memories]
    torch.testing.assert_close(views[0].representations, views[1].representations, rtol=2e-3, atol=2e-3)
    adapter, _ = pema.train(memories[0], pema.preset("residual", epochs=3), tmp_path / "adapter")
    texts = [
        pema.generate(each, used, ["the house", "a dog"], task, pema.Constant(0.7), max_new_tokens=6)
        for each, used in ((plm, adapter), (plm, None), (local, None))
    ]
    assert texts[1] == texts[2]
    with pytest.raises(pema.MismatchError, match="belongs to another PLM: it was made with tiny"):
        pema.generate(local, adapter, ["the house"], task)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"dtype": "float32"}, "dtype=float32 is chosen by the engine that runs the PLM: omit it"),
        ({"device_map": "cpu"}, "device_map=cpu is chosen by the engine that runs the PLM"),
        ({"revision": "main"}, "revision=main is chosen by the engine that runs the PLM"),
        ({"tap": "norm_input"}, "tap=norm_input is not possible with an engine, which returns what the LM head reads"),
    ],
)
def test_settings_that_are_the_engine_s(files, settings, match):
    with pytest.raises(ConfigError, match=match):
        open_plm(f"llamacpp:{files['F32']}", **settings)


def test_requests_that_cannot_be(plm):
    with pytest.raises(DataError, match=r"sequence 0 has 200 tokens, the PLM's context window holds 127"):
        plm.represent([[5] * 200], [1])
    with pytest.raises(DataError, match="prompt 0 is empty"):
        plm.predict([[]], [1])
    with pytest.raises(DataError, match=r"prompt 0 contains token 320, outside the vocabulary of 320 tokens"):
        plm.open_session([[320]])
    session = plm.open_session([[5, 6]])
    with pytest.raises(DataError, match="row 0 continues row 3, the session has 1 rows"):
        session.advance([1], [3])
