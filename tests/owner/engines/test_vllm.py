"""A PLM on vLLM's servers, against exchanges that were recorded from real ones."""

import base64
import json
import shutil
from pathlib import Path

import httpx2
import pytest
import torch
from engine_plm import VOCABULARY, D, build_plm
from exchanges import COMPLETIONS, POOLING, Replay
from scenes import along, open_completing, open_one, open_two, predicted, session, teacher

from pema.errors import ConfigError, DataError, MismatchError, OwnerError
from pema.owner.engines.opening import open_engine
from pema.owner.head import Head
from pema.owner.llamacpp.probe import TEXTS as PROBED

NEAR = {"rtol": 1e-4, "atol": 1e-4}


def same(ours, theirs):
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, **NEAR)


@pytest.fixture
def replay():
    return Replay()


@pytest.fixture
def plm(replay, bundle):
    return open_two(replay.connect, bundle)


def test_contexts_and_sessions_are_those_of_transformers(plm, local):
    assert plm.deviation < 1e-4
    same(teacher(plm), teacher(local))
    same(session(plm), session(local))
    for (f, tokens), (g, others) in zip(predicted(plm), predicted(local), strict=True):
        assert tokens.tolist() == others.tolist()
        torch.testing.assert_close(f, g, **NEAR)


def test_each_thing_is_asked_of_the_server_that_gives_it(plm, replay):
    replay.asked.clear()
    teacher(plm)
    assert replay.paths() == [("pooling", "/pooling")] * 3
    replay.asked.clear()
    predicted(plm)
    assert replay.paths() == [("completions", "/v1/completions"), ("pooling", "/pooling")] * 3
    replay.asked.clear()
    session(plm)
    assert replay.paths() == [("completions", "/v1/completions")] * 4


def test_a_text_ends_at_its_end(plm):
    assert plm._ended([31, 5, 31]) == [31, 5, 31]
    assert plm._ended([31, 2, 31, 2]) == [31, 2]


def test_the_pooling_server_alone(replay, folder, local, capsys):
    plm = open_one(replay.connect, folder)
    said = capsys.readouterr().err
    assert "gives no log-probabilities, so its vectors were held against the final norm only" in said
    assert f"{POOLING} reads the whole context again at each step of generation: append ?completions=" in said
    assert plm.deviation is None
    same(teacher(plm), teacher(local))
    same(session(plm, 1), session(local, 1))
    ((f, tokens),), ((g, others),) = predicted(plm, 1), predicted(local, 1)
    assert tokens.tolist() == others.tolist()
    torch.testing.assert_close(f, g, **NEAR)
    assert {server for server, _ in replay.paths()} == {"pooling"}


def test_the_server_that_completes_with_log_probabilities_alone(replay, bundle, local):
    plm = open_completing(replay.connect, bundle)
    assert plm.deviation < 1e-4
    torch.testing.assert_close(along(plm), along(local), **NEAR)


def test_a_folder_with_the_model_says_more(replay, folder, bundle):
    whole, head = open_two(replay.connect, folder), open_two(replay.connect, bundle)
    assert whole.description.parameters == sum(each.numel() for each in build_plm().model.parameters())
    assert head.description.parameters == 1
    assert whole.description.head_fingerprint == head.description.head_fingerprint
    assert whole.description.max_length == head.description.max_length == 127
    assert whole.description.architecture == "vLLM"


def pooled(change):
    """A change of the vectors of `/pooling`, a function of their (n, d)."""

    def changed(status, value):
        if status != 200:
            return status, value
        (entry,) = value["data"]
        vectors = torch.frombuffer(bytearray(base64.b64decode(entry["data"])), dtype=torch.float32).reshape(-1, D)
        data = base64.b64encode(change(vectors).contiguous().numpy().tobytes()).decode()
        return status, value | {"data": [entry | {"data": data}]}

    return {("pooling", "/pooling"): changed}


def unit(vectors):
    return vectors / vectors.norm(dim=1, keepdim=True)


def before_norm(vectors):
    """Vectors that the final norm maps to these."""
    return torch.arange(1, len(vectors) + 1)[:, None] * vectors / build_plm().model.model.norm.weight.detach()


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        (unit, "these vectors are normalised to one length"),
        (before_norm, "these are vectors before the final norm"),
        (torch.neg, "the engine runs another model, or another file of it"),
    ],
)
def test_vectors_that_the_head_does_not_read(folder, change, cause):
    match = rf"{POOLING} does not fit the LM head of tiny: head\(f\) differs from the engine's own .*; {cause}\. Give"
    with pytest.raises(MismatchError, match=match):
        open_two(Replay(pooled(change)).connect, folder)


@pytest.mark.parametrize("change", [unit, before_norm])
def test_vectors_that_the_final_norm_does_not_return(folder, change):
    match = rf"{POOLING} returns vectors that the final norm of tiny does not: their root mean square differs from 1 by"
    with pytest.raises(MismatchError, match=match):
        open_one(Replay(pooled(change)).connect, folder)


def test_the_pooling_server_alone_needs_the_norm(replay, bundle):
    match = rf"{POOLING} gives no log-probabilities, and head does not say enough to check its vectors: append \?compl"
    with pytest.raises(OwnerError, match=match):
        open_one(replay.connect, bundle)


def test_another_model_behind_the_same_address(replay, tmp_path):
    other = build_plm(5)
    other.head().save(tmp_path / "head")
    other.tokenizer.save_pretrained(tmp_path / "head")
    with pytest.raises(MismatchError, match="the engine runs another model, or another file of it"):
        open_two(replay.connect, tmp_path / "head")


def recorded(server, path, **fields):
    """The recorded answer to a request that has these fields."""
    for request, answer in Replay().recorded():
        if (request["server"], request["path"]) == (server, path) and fields.items() <= (request["body"] or {}).items():
            return answer
    raise AssertionError(fields)


def test_a_server_that_does_not_pool(bundle):
    refusal = recorded("completions", "/pooling")
    replay = Replay({("pooling", "/pooling"): lambda status, value: refusal})
    match = rf"{POOLING} does not pool: start it with --runner pooling --convert embed --pooler-config"
    with pytest.raises(OwnerError, match=match):
        open_two(replay.connect, bundle)


def test_a_server_that_pools_for_another_task(bundle):
    refusal = recorded("pooling", "/pooling", task="embed")
    assert refusal[0] == 400
    replay = Replay({("pooling", "/pooling"): lambda status, value: refusal})
    match = rf"{POOLING} pools for another task \(.*pooling_task.*\): start it with --runner pooling --convert embed"
    with pytest.raises(OwnerError, match=match):
        open_two(replay.connect, bundle)


def test_a_server_that_does_not_complete(bundle):
    refusal = recorded("pooling", "/v1/completions")
    replay = Replay({("completions", "/v1/completions"): lambda status, value: refusal})
    with pytest.raises(OwnerError, match=rf"{COMPLETIONS}"):
        open_two(replay.connect, bundle)


class Capped(Replay):
    """The server that completes, started with another --max-logprobs (20 is vLLM's default)."""

    def __init__(self, most):
        super().__init__()
        self.most = most

    def answer(self, request):
        body = json.loads(request.content) if request.content else {}
        if body.get("logprobs") == self.most:
            request = httpx2.Request(request.method, request.url, json=body | {"logprobs": VOCABULARY})
        response = super().answer(request)
        value = response.json()
        if "error" in value:
            value["error"]["message"] = value["error"]["message"].replace(str(VOCABULARY), str(self.most))
        for choice in value.get("choices", ()):
            (entries,) = choice["logprobs"]["top_logprobs"]
            choice["logprobs"]["top_logprobs"] = [dict(list(entries.items())[: self.most + 1])]
        return httpx2.Response(response.status_code, json=value)


def test_fewer_log_probabilities_than_determine_f(bundle):
    match = rf"{COMPLETIONS} returns the log-probabilities of 10 tokens, and those of 18 or more determine the 16 numb"
    with pytest.raises(OwnerError, match=match):
        open_two(Capped(10).connect, bundle)


def test_fewer_log_probabilities_than_can_be_compared(bundle):
    with pytest.raises(OwnerError, match=rf"{COMPLETIONS} returns the log-probabilities of 1 tokens: start vLLM with"):
        open_two(Capped(1).connect, bundle)


def test_a_recovered_head_is_refused_before_a_text_is_sent(replay, bundle, tmp_path):
    folder = Path(shutil.copytree(bundle, tmp_path / "head"))
    (folder / "recovery.json").write_text("{}")
    match = rf"{folder} was recovered from .* vLLM returns vectors in the model's: name the PLM logprobs\+http"
    with pytest.raises(OwnerError, match=match):
        open_two(replay.connect, folder)
    assert {path for _, path in replay.paths()} == {"/v1/models"}


def test_a_server_without_tls_is_refused_before_the_model_is_read(folder, monkeypatch):
    monkeypatch.setattr("pema.owner.engines.opening.material_of", pytest.fail)
    for name in (f"vllm+http://host:8001#{folder}", f"sglang+http://host:1#{folder}"):
        with pytest.raises(ConfigError, match=r"http://host:\d+ is not https: prompts and key would be sent"):
            open_engine(name)


def test_a_context_that_is_too_long(plm, replay):
    asked = len(replay.asked)
    with pytest.raises(DataError, match=r"sequence 0 has 128 tokens, the PLM's context window holds 127"):
        list(plm.represent([[1] * 128], [1]))
    assert len(replay.asked) == asked


def test_a_context_that_is_too_long_for_the_pooling_server(plm, replay):
    refusal = recorded("pooling", "/pooling", input=[1, *[70] * 200])
    replay.changes = {("pooling", "/pooling"): lambda status, value: refusal}
    with pytest.raises(DataError, match="maximum context length is 128 tokens"):
        teacher(plm)


def test_a_soft_cap_takes_the_steps_from_the_vectors(replay, local, folder, tmp_path, capsys):
    """With a cap so high that the logits do not change."""
    Head(local.head().weight, soft_cap=1e6).save(tmp_path / "head")
    local.tokenizer.save_pretrained(tmp_path / "head")
    plm = open_two(replay.connect, tmp_path / "head")
    assert f"{POOLING} reads the whole context again at each step of generation.\n" in capsys.readouterr().err
    same(session(plm, 1), session(local, 1))


@pytest.mark.parametrize(
    ("answer", "match"),
    [
        (b"<html>", "answered without vectors of 16 numbers in base64: check that vLLM's server runs there, a recent"),
        ({"data": [{"data": [[0.0] * D]}]}, "answered without vectors of 16 numbers in base64"),
        ({"data": [{"data": "AAAA"}]}, "answered without vectors of 16 numbers in base64"),
        (
            {"data": [{"data": base64.b64encode(bytes(4 * D)).decode()}]},
            r"gives 1 vectors of 16 numbers for \d+ tokens: start it",
        ),
    ],
)
def test_answers_that_no_such_server_gives(plm, replay, answer, match):
    replay.changes = {("pooling", "/pooling"): lambda status, value: (status, answer)}
    with pytest.raises(OwnerError, match=match):
        teacher(plm)


def test_vectors_that_are_not_finite(plm, replay):
    replay.changes = pooled(lambda vectors: vectors / 0)
    with pytest.raises(OwnerError, match="answered with vectors that are not finite"):
        teacher(plm)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"tokens": ["x"] * 7}, "answered without the tokens of a text, or with tokens that are not numbers"),
        ({"tokens": []}, r"answered with 0 tokens, 5 were requested"),
    ],
)
def test_texts_that_cannot_be(plm, replay, change, match):
    def changed(status, value):
        return status, value | {"choices": [each | {"logprobs": change} for each in value["choices"]]}

    replay.changes = {("completions", "/v1/completions"): changed}
    with pytest.raises(OwnerError, match=match):
        predicted(plm)


@pytest.mark.parametrize(
    ("query", "match"),
    [
        ("?completion=http://x", r"unknown query 'completion' of the address http://p: use completions.*did you mean"),
        ("?completions=host:1", "completions=host:1 is not the address of a server: give http://host:port"),
    ],
)
def test_addresses_that_cannot_be(replay, bundle, query, match):
    with pytest.raises(ConfigError, match=match):
        open_engine(f"vllm+http://p{query}#{bundle}", replay.connect)


def test_no_vectors_are_requested_before_the_tokens_agree(bundle):
    replay = Replay({("pooling", "/tokenize"): lambda status, value: (status, {"tokens": [9]})})
    with pytest.raises(MismatchError, match="has another tokenizer"):
        open_two(replay.connect, bundle)
    assert ("pooling", "/pooling") not in replay.paths()


def test_before_the_probe_has_passed_only_fixed_texts_are_sent(plm, replay):
    texts = [list(plm.tokenizer(text).input_ids) for text in PROBED]
    assert [each["body"]["input"] for each in replay.asked if each["path"] == "/pooling"] == texts
