"""A PLM behind an API that returns log-probabilities: the contract holds, with f in the basis of the recovered head."""

import dataclasses
import shutil

import pytest
import torch
from apis import URL, FakeAPI, connect, connected

import pema
from gguf_files import build_llama
from pema.errors import ConfigError, DataError, MismatchError, OwnerError
from pema.owner.bundle import NormSettings
from pema.owner.head import Head, Norm
from pema.owner.local import LocalPLM
from pema.owner.logprobs.plm import LogProbPLM
from pema.owner.opening import open_plm
from pema.owner.sources.served import Served
from tiny import build_tokenizer


def ordered(parts):
    return sorted(parts, key=lambda part: part.index)


def log_probabilities(plm, f):
    return plm.head()(f).log_softmax(dim=1)


@pytest.fixture
def plm(local, recovered):
    return connect(FakeAPI(local), recovered)


def test_teacher_contexts_are_the_true_ones_in_another_basis(plm, local, texts):
    assert plm.deviation < 1e-4
    ours = torch.cat([part.representations for part in ordered(plm.represent(texts * 4, [2, 3, 1] * 4))])
    theirs = torch.cat([part.representations for part in ordered(local.represent(texts * 4, [2, 3, 1] * 4))])
    assert ours.shape == theirs.shape
    torch.testing.assert_close(log_probabilities(plm, ours), log_probabilities(local, theirs), rtol=0, atol=1e-3)
    rows = local.head().weight.double() - local.head().weight.double().mean(dim=0)
    transformation = torch.linalg.lstsq(plm.head().weight.double(), rows).solution
    torch.testing.assert_close(ours.double(), theirs.double() @ transformation.T, rtol=1e-3, atol=1e-3)


def test_one_request_for_each_example(plm, texts):
    api = plm._api.connection._client._transport
    api.asked.clear()
    list(plm.represent(texts, [2, 3, 1], skip=frozenset({1})))
    assert [body["prompt"][0] for _, body in api.asked] == [texts[0][:-1], texts[2][:-1]]


def test_predicted_contexts_are_the_true_ones(plm, local, texts):
    for a, b in zip(ordered(plm.predict(texts, [6, 1, 9])), ordered(local.predict(texts, [6, 1, 9])), strict=True):
        assert a.generated.tolist() == b.generated.tolist()
        torch.testing.assert_close(
            log_probabilities(plm, a.representations), log_probabilities(local, b.representations), rtol=0, atol=1e-3
        )


def test_sessions_are_the_true_ones(plm, local, texts):
    ours, theirs = plm.open_session(texts), local.open_session(texts)
    for chosen, parents in (([5, 6, 7], None), ([20, 21, 22, 23], [2, 0, 0, 1]), ([30], [3])):
        ours.advance(chosen, parents)
        theirs.advance(chosen, parents)
        torch.testing.assert_close(
            log_probabilities(plm, ours.representations),
            log_probabilities(local, theirs.representations),
            rtol=0,
            atol=1e-3,
        )
    ours.close()
    with pytest.raises(DataError, match="the session is closed"):
        ours.advance([5])


@pytest.mark.parametrize(("most", "bound"), [(200, 1e-3), (50, 1e-3), (34, 0.2)])
def test_f_is_determined_by_d_and_two_likeliest_tokens(local, recovered, texts, most, bound):
    """34 equations for 32 numbers and a constant; with 50 the system is well conditioned."""
    plm = connect(FakeAPI(local, most=most), recovered)
    (a,), (b,) = plm.represent(texts[:1], [2]), local.represent(texts[:1], [2])
    ours, theirs = log_probabilities(plm, a.representations), log_probabilities(local, b.representations)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=bound)


@pytest.mark.parametrize("most", [33, 20, 5])
def test_fewer_are_refused_before_anything_is_paid_for(local, recovered, most):
    match = rf"{URL} returns the log-probabilities of {most} tokens, and those of 34 or more determine the 32 numbers"
    api = FakeAPI(local, most=most)
    with pytest.raises(OwnerError, match=match):
        connect(api, recovered)
    assert not api.completions()


@pytest.mark.parametrize(("most", "said"), [(34, True), (49, True), (50, False), (None, False)])
def test_few_that_enlarge_rounding_are_named_before_anything_is_paid_for(local, recovered, most, said, capsys):
    class Stopping(FakeAPI):
        """Stops to answer at the first request that costs something."""

        def complete(self, body):
            return super().complete(body) if body["logprobs"] > self.most else (404, {"detail": "Not Found"})

    with pytest.raises(OwnerError):
        connect(Stopping(local, most=most), recovered)
    words = f"returns the log-probabilities of {most} tokens: they determine the 32 numbers of f, and enlarge the roun"
    assert (words in capsys.readouterr().err) == said


TASK = pema.Task("letters", pema.Template("{source} ="), ("bleu",), "")
SOURCES = ("abc", "dog", "cat", "house", "one two")


def build(plm, folder):
    examples = [pema.Example(text, text[::-1]) for text in SOURCES]
    return pema.build_memory(plm, examples, TASK, folder, contexts="teacher", dtype="float32")


def test_an_adapter_in_the_other_basis_generates_the_same_texts(plm, local, tmp_path):
    """With f = T f_true and W_hd = W' T, A T^-1 and T B_pd are the same adapter."""
    theirs, _ = pema.train(
        build(local, tmp_path / "true"), pema.TrainConfig(rank=8, epochs=4, learning_rate=0.01), tmp_path / "adapter"
    )
    rows = local.head().weight.double() - local.head().weight.double().mean(dim=0)
    transformation = torch.linalg.lstsq(plm.head().weight.double(), rows).solution
    ours = pema.Adapter(dataclasses.replace(theirs.config, plm=plm.description))
    with torch.no_grad():
        ours.A.copy_(theirs.A.double() @ transformation.inverse())
        ours.B_pd.copy_(transformation @ theirs.B_pd.double())
    schedule = pema.Constant(0.9)
    texts = [pema.generate(*pair, SOURCES, TASK, schedule, max_new_tokens=8) for pair in ((plm, ours), (local, theirs))]
    assert texts[0] == texts[1]
    assert texts[0] != pema.generate(local, None, SOURCES, TASK, max_new_tokens=8)


def test_an_adapter_that_is_trained_on_recovered_representations(plm, tmp_path):
    """Perplexity falls as with any memory."""
    memory = build(plm, tmp_path / "memory")
    adapter, _ = pema.train(memory, pema.preset("best", epochs=30, rank=32), tmp_path / "adapter")
    alone, adapted = (
        pema.perplexity(memory.view(), plm.head(), adapter, schedule)
        for schedule in (pema.NoAdapter(), pema.Constant(0.9))
    )
    assert adapted < alone / 4


def test_the_plm_alone_generates_the_same_texts(plm, local):
    ours, theirs = (pema.generate(each, None, SOURCES, TASK, max_new_tokens=8) for each in (plm, local))
    assert ours == theirs


def test_what_a_build_takes_is_said_before(plm, local, recovered):
    assert plm.forecast("teacher", [10, 20]) == [
        "2 requests, one for each example, for 50 log-probabilities of each of 30 tokens: 0 MB of answers."
    ]
    assert plm.forecast("predicted", [10, 20])[0].startswith("One request for each token after a prompt, for 50 log-")


def test_the_description_names_the_api_and_the_head(plm, local, recovered):
    about = plm.description
    assert about.architecture == "completions (log-probabilities)"
    assert about.head_fingerprint == Head.load(recovered).fingerprint
    assert about.d == 32
    assert about.max_length == 127
    assert about.tokenizer_fingerprint == local.description.tokenizer_fingerprint
    assert about.fingerprint != local.description.fingerprint


def test_a_server_of_several_models_needs_a_name(local, recovered):
    class Two(FakeAPI):
        def models(self, body):
            return 200, {"data": [{"id": "tiny", "max_model_len": 128}, {"id": "large"}]}

    api = Two(local)
    with pytest.raises(OwnerError, match=r"has 2 models \('tiny', 'large'\): append \?model=NAME to the address"):
        connect(api, recovered)
    with pytest.raises(ConfigError, match=r"unknown model 'tini' of http://127\.0\.0\.1:9: use .*did you mean .tiny"):
        LogProbPLM.connect(Served("head", recovered, f"{URL}?model=tini"), connected(api))
    plm = LogProbPLM.connect(Served("head", recovered, f"{URL}?model=tiny"), connected(api))
    assert plm._api.about.model == "tiny"


def test_a_server_that_hides_its_tokens(local, recovered, capsys):
    connect(FakeAPI(local, answers={"/tokenize": lambda value: {"detail": "Not Found"}}), recovered)
    assert f"{URL} does not show how it splits texts" in capsys.readouterr().err


def test_another_tokenizer(local, recovered):
    api = FakeAPI(local, answers={"/tokenize": lambda value: {"tokens": [*value["tokens"], 9]}})
    with pytest.raises(MismatchError, match=rf"{URL} has another tokenizer: of 'Two words"):
        connect(api, recovered)


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"soft_cap": 30.0}, OwnerError, r"bundle has a soft cap on its logits, so f cannot be recovered"),
        ({"norm": Norm(NormSettings("rms", 1e-6), torch.ones(32), None)}, OwnerError, "begins before the final norm"),
    ],
)
def test_heads_that_are_not_linear(local, recovered, tmp_path, change, error, match):
    folder = tmp_path / "bundle"
    shutil.copytree(recovered, folder)
    for name in ("head.json", "head.safetensors"):
        (folder / name).unlink()
    Head(Head.load(recovered).weight, **change).save(tmp_path / "head")
    for file in (tmp_path / "head").iterdir():
        shutil.copy(file, folder)
    with pytest.raises(error, match=match):
        connect(FakeAPI(local), folder)


def test_a_released_head_does_too(local, recovered, tmp_path, texts):
    """The owner's own head, with the tokenizer's files."""
    folder = tmp_path / "released"
    local.head().save(folder)
    local.tokenizer.save_pretrained(folder)
    plm = connect(FakeAPI(local), folder)
    (a,), (b,) = plm.represent(texts[:1], [2]), local.represent(texts[:1], [2])
    torch.testing.assert_close(a.representations, b.representations, rtol=1e-3, atol=1e-3)


def test_a_model_with_more_tokens(local, recovered):
    api = FakeAPI(local)
    api.head = LocalPLM(build_llama(), build_tokenizer()).head()
    plm = connect(api, recovered)
    plm._head = Head(plm.head().weight[:200])
    plm._reading._head = plm._head
    with pytest.raises(OwnerError, match=r"answered with token \d+, outside the vocabulary of 200 tokens"):
        list(plm.represent([[1, 5, 6]], [1]))


@pytest.mark.parametrize(
    ("name", "error", "match"),
    [
        (
            "logprobs+127.0.0.1#head",
            ConfigError,
            r"is not the address of a server: give logprobs\+http://host:port#HEAD",
        ),
        (
            f"logprobs+{URL}",
            ConfigError,
            r"does not say where the LM head is: append # and the folder that `pema rec",
        ),
        (f"logprobs+{URL}#nowhere", OwnerError, "the folder nowhere does not exist: give the folder that `pema rec"),
        (f"logprobs+{URL}#a.gguf", OwnerError, r"the folder a\.gguf does not exist: give the folder that `pema rec"),
    ],
)
def test_names_that_lead_nowhere(name, error, match):
    with pytest.raises(error, match=match):
        open_plm(name)


def test_a_folder_without_a_head_says_how_to_recover_it(tmp_path):
    with pytest.raises(OwnerError, match=rf"contains no LM head: recover it with `pema recover {URL} --tokenizer"):
        open_plm(f"logprobs+{URL}#{tmp_path}")


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"dtype": "float32"}, r"dtype=float32 is chosen by the engine that runs the PLM: omit it"),
        ({"tap": "norm_input"}, r"tap=norm_input is not possible with an engine, which returns what the LM head reads"),
    ],
)
def test_settings_that_the_api_chooses(recovered, settings, match):
    with pytest.raises(ConfigError, match=match):
        open_plm(f"logprobs+{URL}#{recovered}", **settings)


def test_it_needs_the_plm_itself(recovered):
    with pytest.raises(OwnerError, match="is the address of a server, and this needs the PLM itself"):
        LocalPLM.load(f"logprobs+{URL}#{recovered}")


@pytest.mark.parametrize(
    ("path", "answer", "match"),
    [
        ("/v1/models", b"<html>", rf"{URL}/v1/models is not a list of models: check that llama\.cpp's server or an"),
        ("/v1/models", {"data": [7]}, "is not a list of models"),
        ("/v1/completions", b"<html>", r"answered /v1/completions in another form than vLLM: check that vLLM's server"),
        ("/v1/completions", {"choices": [{"index": 0}]}, "answered without log-probabilities, or with tokens that are"),
    ],
)
def test_answers_that_no_such_api_gives(local, recovered, path, answer, match):
    with pytest.raises(OwnerError, match=match):
        connect(Ignoring(local, answers={path: lambda value: answer}), recovered)


class Ignoring(FakeAPI):
    """A server that does not refuse a large number of log-probabilities."""

    def complete(self, body):
        return super().complete(body | {"logprobs": min(body["logprobs"], self.most)})


def changed(value, **fields):
    return value | {"choices": [choice | fields for choice in value["choices"]]}


def top(value):
    return {"logprobs": {"top_logprobs": [value]}}


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda value: value | {"choices": []}, "answered 0 of 1 prompts"),
        (lambda value: changed(value, prompt_logprobs=None), "answered without the log-probabilities of the prompt"),
        (lambda value: changed(value, prompt_logprobs=[None]), "answered without the log-probabilities of the prompt"),
        (
            lambda value: changed(value, **top({"token_id:5": -1.0})),
            "answered with 1 log-probabilities, 50 were",
        ),
        (
            lambda value: changed(value, **top({f"token_id:{i}": float("nan") for i in range(50)})),
            "log-probabilities that are not finite",
        ),
        (
            lambda value: changed(value, **top({f"token_id:{i}": -9999.0 for i in range(50)})),
            r"excludes token \d+ of 'tiny': start the server without a list of allowed tokens",
        ),
        (lambda value: changed(value, **top({"house": -1.0})), "or with tokens that are not numbers"),
    ],
)
def test_answers_of_a_build_that_cannot_be(local, recovered, texts, change, match):
    api = FakeAPI(local)
    plm = connect(api, recovered)
    api.answers["/v1/completions"] = change
    with pytest.raises(OwnerError, match=match):
        list(plm.represent(texts[:1], [2]))


def test_an_api_that_does_not_say_how_many(local, recovered):
    class Vague(FakeAPI):
        def complete(self, body):
            return 400, {"error": {"message": "logprobs is too large", "code": 400}}

    with pytest.raises(OwnerError, match=r"does not say how many log-probabilities it returns: .*is too large"):
        connect(Vague(local), recovered)
