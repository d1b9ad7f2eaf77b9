"""The probe before anything is stored: what an engine must not be, and how the message names it."""

import shutil

import httpx2
import pytest
import torch
from engines import URL, FakeEngine, connect

from gguf_files import TEMPLATE, build_llama, write_gguf
from pema.errors import ConfigError, DataError, MismatchError, OwnerError
from pema.owner.client.connection import Connection
from pema.owner.head import Head
from pema.owner.llamacpp.engine import Engine
from pema.owner.llamacpp.material import material
from pema.owner.llamacpp.plm import LlamaCppPLM
from pema.owner.llamacpp.recovery import Recovery
from pema.owner.local import LocalPLM
from pema.owner.mask import Mask, MaskedPLM
from pema.owner.sources.served import Served
from tiny import build_tokenizer


def another(seed=5):
    tokenizer = build_tokenizer()
    tokenizer.chat_template = TEMPLATE
    return LocalPLM(build_llama(seed), tokenizer)


@pytest.mark.parametrize(
    ("settings", "error", "match"),
    [
        (
            {"vectors": "unit"},
            MismatchError,
            rf"{URL} does not fit the LM head of tiny: head\(f\) differs from the engine's own log-probabilities by "
            r"\d+%, at most 10% is accepted; these vectors are normalised to one length\. Give the file",
        ),
        ({"vectors": "before norm"}, MismatchError, "these are vectors before the final norm"),
        ({"vectors": "pooled"}, OwnerError, r"pools its vectors: it gives 1 for \d+ tokens\. Start it with --pooling"),
        (
            {"stale": True},
            MismatchError,
            rf"{URL} answers differently from its cache: the deviation is \d+%.* Start the server with --swa-full",
        ),
        ({"stale": True, "vectors": "none"}, MismatchError, "answers differently from its cache"),
    ],
)
def test_an_engine_that_returns_something_else(files, local, settings, error, match):
    with pytest.raises(error, match=match):
        connect(files["F32"], FakeEngine(local, **settings))


@pytest.mark.parametrize("vectors", ["plain", "none"])
def test_another_model_of_the_same_shape(files, vectors):
    with pytest.raises(MismatchError, match=r"the engine runs another model, or another file of it\. Give the file"):
        connect(files["F32"], FakeEngine(another(), vectors=vectors))


def test_another_model_of_another_shape(files, local):
    engine = FakeEngine(local, meta={"n_params": 1_000_000})
    with pytest.raises(MismatchError, match=r"runs another model than tiny: 1,000,000 weights, expected 39,072\. Give"):
        connect(files["F32"], engine)
    with pytest.raises(MismatchError, match=r"runs another model than tiny: 7 tokens, expected 320"):
        connect(files["F32"], FakeEngine(local, meta={"n_vocab": 7}))


def test_another_quantisation_is_another_file(files, local):
    sizes = {"n_params": 39_072, "size": files["F32"].stat().st_size}
    with pytest.raises(MismatchError, match="bytes of weights, expected"):
        connect(files["Q8_0"], FakeEngine(local, meta=sizes))


def test_an_engine_that_agrees_nearly_is_accepted_and_its_deviation_said(files, local, capsys):
    # The head at hand is rounded to eight bits, that of the engine is not.
    plm = connect(files["Q8_0"], FakeEngine(local))
    assert 1e-3 < plm.deviation < 0.05
    assert f"differs from the engine's own log-probabilities by {plm.deviation:.2%} (at most 10% is" in (
        capsys.readouterr().err
    )


def test_a_tokenizer_that_is_not_the_engine_s(files, local):
    answers = {"/tokenize": lambda value: {"tokens": [*value["tokens"][:-1], 9, 9]}}
    with pytest.raises(MismatchError, match=r"another tokenizer: of 'Two words.*the tokenizer at hand gives \[\d+\]"):
        connect(files["F32"], FakeEngine(local, answers=answers))


def test_a_chat_that_is_written_differently_is_said(files, local, capsys):
    connect(files["F32"], FakeEngine(local))
    assert "writes a chat differently" not in capsys.readouterr().err
    connect(files["F32"], FakeEngine(local, answers={"/apply-template": lambda value: {"prompt": "[Hello there]"}}))
    assert f"{URL} writes a chat differently from its chat template" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("path", "answer", "match"),
    [
        ("/props", b"<html>", rf"{URL} answered with something that is not JSON: check that llama\.cpp's server runs"),
        ("/props", {}, "does not describe its model as llama.cpp's server does"),
        ("/props", {"default_generation_settings": {"n_ctx": 0}}, "does not describe its model"),
        ("/props", [], "answered /props in another form than llama.cpp's server"),
        ("/v1/models", {"data": [{"meta": {"n_embd": "wide"}}]}, "does not describe its model"),
        ("/lora-adapters", [{"path": "x.gguf", "scale": 1.0}], "applies a LoRA adapter .*x.gguf.*: start it without"),
        ("/lora-adapters", [{"path": "x.gguf"}], "does not describe its model"),
        ("/tokenize", {"tokens": [1.5]}, "answered with tokens that are not numbers"),
        ("/apply-template", {}, "answered a chat with something that is not a text"),
        ("/embedding", [{"embedding": [[1.0, 2.0]]}], "answered with vectors that do not have 32 numbers each"),
        ("/embedding", [{"embedding": [[1e400] * 32]}], "answered with 1 vectors, or infinite ones, for"),
        ("/embedding", [{"embedding": [[0.0] * 32] * 2}], "answered with 2 vectors, or infinite ones, for"),
        ("/completion", {}, "answered without the 320 probabilities that were requested"),
    ],
)
def test_answers_that_no_server_of_llama_cpp_gives(files, local, path, answer, match):
    with pytest.raises(OwnerError, match=match):
        connect(files["F32"], FakeEngine(local, answers={path: lambda value: answer}))


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda value: value[:-1], "answered 2 of 3 prompts"),
        (lambda value: [{"index": i} for i in range(3)], "answered without the 50 probabilities that were requested"),
    ],
)
def test_answers_of_a_step_that_cannot_be(files, local, texts, change, match):
    engine = FakeEngine(local)
    plm = connect(files["F32"], engine)
    engine.answers["/completion"] = change
    with pytest.raises(OwnerError, match=match):
        plm.open_session(texts)


def test_probabilities_of_tokens_that_were_not_requested(files, local, texts):
    engine = FakeEngine(local)
    plm = connect(files["F32"], engine)

    foreign = max(set(range(320)) - set(plm._probed.recovery.tokens))

    def other(value):
        value["completion_probabilities"][0]["top_probs"][0]["id"] = foreign
        return value

    engine.answers["/completion"] = lambda value: [other(each) for each in value]
    with pytest.raises(OwnerError, match="probabilities of other tokens than those that were requested"):
        plm.open_session(texts[:2])


@pytest.mark.parametrize("scale", [4.0, 0.25])
@pytest.mark.parametrize("divides", [False, True])
def test_a_scale_of_the_logits_is_found_by_trial(tmp_path, local, scale, divides):
    file = write_gguf(tmp_path / "scaled.gguf", "F32", tokenizer_pre="gpt-2", logit_scale=scale)
    engine = FakeEngine(local)
    applied = 1 / scale if divides else scale
    engine.head = Head(local.head().weight, scale=applied)
    plm = connect(file, engine)
    assert plm.head().scale == pytest.approx(applied)
    prompt = [5, 6, 7]
    torch.testing.assert_close(plm.open_session([prompt]).representations, engine.f(prompt)[-1:], rtol=1e-3, atol=1e-3)
    engine.vectors = "none"
    with pytest.raises(OwnerError, match=r"scales its logits, and .* gives no vectors to find out how"):
        connect(file, engine)


def test_a_soft_cap_needs_vectors(tmp_path, local):
    file = write_gguf(tmp_path / "capped.gguf", "F32", tokenizer_pre="gpt-2", final_logit_softcapping=3.0)
    engine = FakeEngine(local)
    engine.head = Head(local.head().weight, soft_cap=3.0)
    plm = connect(file, engine)
    assert plm.head().soft_cap == 3.0
    session = plm.open_session([[5, 6, 7], [8, 9]])
    session.advance([4, 5])
    torch.testing.assert_close(session.representations[1], engine.f([8, 9, 5])[-1], rtol=1e-4, atol=1e-5)
    engine.batch = 3
    with pytest.raises(DataError, match=r"gives no vectors for a context of 5 tokens: start it with a larger --ubatch"):
        session.advance([4, 5])
    engine.batch, engine.vectors = 128, "none"
    with pytest.raises(OwnerError, match="has a soft cap on its logits, so f cannot be recovered"):
        Recovery.of(plm.head(), material(Served("capped", file, URL)))


def test_a_vocabulary_that_is_too_small_to_recover_from(files):
    at_hand = material(Served("tiny", files["F32"], URL))
    head = Head(torch.randn(20, 32))
    small = type(at_hand)(**vars(at_hand) | {"heads": (head,), "rows": lambda tokens: head.weight[tokens]})
    with pytest.raises(OwnerError, match=r"\d+ ordinary tokens do not determine 32 numbers"):
        Recovery.of(head, small)


def test_recovery_is_least_squares_on_centred_logits():
    torch.manual_seed(0)
    W, f, c = torch.randn(60, 8).double(), torch.randn(5, 8).double(), torch.randn(5, 1).double()
    bias = torch.randn(60).double()
    recovery = Recovery(list(range(60)), torch.linalg.pinv(torch.cat([W, -torch.ones(60, 1).double()], 1))[:8], bias)
    noisy = f @ W.T + bias - c + 0.1 * torch.randn(5, 60)
    centred = W - W.mean(0)
    expected = torch.linalg.lstsq(centred, (noisy - bias - (noisy - bias).mean(1, keepdim=True)).T).solution.T
    torch.testing.assert_close(recovery(noisy).double(), expected, rtol=1e-5, atol=1e-5)


@pytest.fixture
def bundle(files, tmp_path, local):
    """A released head bundle with the tokenizer's files."""
    plm = LocalPLM.load(files["F32"])
    plm.head().save(tmp_path / "head")
    plm.tokenizer.save_pretrained(tmp_path / "head")
    return tmp_path / "head"


def test_a_released_head_with_the_tokenizer_s_files(bundle, files, local, texts):
    plm, whole = connect(bundle, FakeEngine(local)), connect(files["F32"], FakeEngine(local))
    assert plm.description.head_fingerprint == whole.description.head_fingerprint
    assert plm.description.tokenizer_fingerprint == whole.description.tokenizer_fingerprint
    (part,), (expected,) = plm.represent(texts[:1], [2]), whole.represent(texts[:1], [2])
    assert torch.equal(part.representations, expected.representations)
    other = connect(bundle, FakeEngine(local, meta={"size": 5})).description.fingerprint
    assert other != plm.description.fingerprint


def test_a_released_head_without_the_tokenizer_s_files(bundle, local):
    for file in bundle.glob("*token*"):
        file.unlink()
    with pytest.raises(OwnerError, match=r"contains a head bundle and no tokenizer: copy the model's tokenizer\.json"):
        connect(bundle, FakeEngine(local))


def test_a_folder_without_a_head(bundle, local):
    (bundle / "head.json").unlink()
    with pytest.raises(OwnerError, match="contains no readable head bundle"):
        connect(bundle, FakeEngine(local))


def test_heads_that_an_engine_cannot_have(bundle, files, local, tmp_path):
    shutil.rmtree(bundle)
    MaskedPLM(LocalPLM.load(files["F32"]), Mask(bytes(32))).head().save(bundle)
    with pytest.raises(OwnerError, match=r"is masked, and llama\.cpp returns representations as they are"):
        connect(bundle, FakeEngine(local))
    shutil.rmtree(bundle)
    LocalPLM.load(files["F32"], tap="norm_input").head().save(bundle)
    with pytest.raises(OwnerError, match=r"begins before the final norm, and llama\.cpp returns what comes after it"):
        connect(bundle, FakeEngine(local))
    (bundle / "recovery.json").write_text("{}")
    match = r"was recovered from log-probabilities, .* llama\.cpp returns .* logprobs\+http://host:port#.*head, with"
    with pytest.raises(OwnerError, match=match):
        connect(bundle, FakeEngine(local))


def test_a_server_without_tls_is_refused_before_the_file_is_read(files, monkeypatch):
    monkeypatch.setattr("pema.owner.llamacpp.plm.material", pytest.fail)
    with pytest.raises(ConfigError, match="http://host:8080 is not https: prompts and key would be sent"):
        LlamaCppPLM(Served("tiny", files["F32"], "http://host:8080"))


def test_a_file_without_a_head(tmp_path, local):
    file = write_gguf(tmp_path / "headless.gguf", "F32", without=("lm_head.weight", "model.embed_tokens.weight"))
    with pytest.raises(OwnerError, match=r"has no matrix output\.weight or token_embd\.weight: no LM head"):
        connect(file, FakeEngine(local))


def test_tied_embeddings_are_the_head(tmp_path, local):
    file = write_gguf(tmp_path / "tied.gguf", "F32", tokenizer_pre="gpt-2", model=build_llama(tied=True))
    tokenizer = build_tokenizer()
    tokenizer.chat_template = local.tokenizer.chat_template
    model = LocalPLM(build_llama(tied=True), tokenizer)
    assert torch.equal(connect(file, FakeEngine(model)).head().weight, model.head().weight)


def test_a_server_that_has_ended_is_named():
    def refuse(request):
        raise httpx2.ConnectError("refused")

    connection = Connection(URL, transport=httpx2.MockTransport(refuse), patience=0.0)
    engine = Engine(connection, lambda: "was killed by signal 9")
    with pytest.raises(OwnerError, match=r"the server of llama\.cpp was killed by signal 9: check that there"):
        engine.tokens("text")
