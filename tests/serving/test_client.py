"""The data owner's client against the server's application: the same contract, the same answers."""

import contextlib
import json
import re
from typing import get_args

import httpx2
import pytest
import torch
from served import bearer, key, served

from pema.adapter.config import AdapterConfig
from pema.adapter.module import Adapter
from pema.adapter.presets import preset
from pema.adapter.schedule import Constant, GradualUnrolling, NoAdapter
from pema.adapter.training import train
from pema.api import PLM
from pema.errors import ConfigError, DataError, ExternalMemoryError, MismatchError, OwnerError
from pema.generation.classification import classify
from pema.generation.decoding import generate
from pema.memory.build import build_memory
from pema.memory.reader import Memory
from pema.owner.client.connection import Connection
from pema.owner.client.remote import RemotePLM
from pema.owner.mask import Mask, MaskedPLM
from pema.owner.opening import open_plm
from pema.pages.inspector.inspection import inspect_generation
from pema.serving.policy import Endpoint, Policy
from pema.tasks.example import Example
from pema.tasks.registry import Task
from pema.tasks.template import Template

URL = "http://localhost:1"
TASK = Task("test", Template("say {source}\nGerman:"), (), "")
SOURCES = ["the house", "a dog is here and the house is small", "the", "a dog", "the dog is small", "the house"]
EXAMPLES = [Example(source, f"das Haus {i} ist klein"[: 8 + 3 * i]) for i, source in enumerate(SOURCES)]
SEQUENCES, STARTS = [[1, 5, 6, 7, 9, 11], [1, 5, 8], [1, 5, 6, 7] * 5], [2, 1, 9]


class Wire(httpx2.BaseTransport):
    """Hands requests to an application in the process and keeps what crosses; `before` may answer instead."""

    def __init__(self, client, before=None):
        self.client, self.before, self.requests, self.answers = client, before, [], []

    def handle_request(self, request):
        body = request.read()
        self.requests.append((request.method, request.url.path, body))
        early = self.before(len(self.requests), request) if self.before else None
        if early is not None:
            return early
        headers = {name: value for name, value in request.headers.items() if name != "host"}
        answer = self.client.request(request.method, request.url.path, content=body, headers=headers)
        self.answers.append(answer.content)
        return httpx2.Response(answer.status_code, headers=dict(answer.headers), content=answer.content)


def remote(client, *, before=None, dtype="float32", key=None, patience=2.0):
    wire = Wire(client, before)
    return RemotePLM(URL, dtype=dtype, connection=Connection(URL, key=key, patience=patience, transport=wire)), wire


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch):
    monkeypatch.setattr("pema.owner.client.connection.time.sleep", lambda _: None)


def adapter_of(plm):
    config = AdapterConfig(d=plm.head().d, vocabulary_size=plm.head().vocabulary_size, rank=8, plm=plm.description)
    adapter = Adapter(config, seed=1)
    torch.nn.init.normal_(adapter.B_pd, std=0.5, generator=torch.Generator().manual_seed(1))
    return adapter


def test_it_is_the_same_plm(client, plm):
    across, _ = remote(client)
    assert across.description == plm.description
    text = "the house is small"
    assert across.tokenizer(text).input_ids == plm.tokenizer(text).input_ids
    assert torch.equal(across.head().weight, plm.head().weight)
    assert across.head().fingerprint == plm.head().fingerprint


def test_contexts_are_the_same(client, plm):
    across, _ = remote(client)
    for ask in (
        lambda plm, n: plm.represent(SEQUENCES, STARTS, batch_tokens=n),
        lambda plm, n: plm.predict([[1, 5], [1, 9, 9, 4], [1] * 9], [5, 8, 11], batch_tokens=n),
    ):
        expected = {r.index: r for r in ask(plm, 100)}
        for tokens in (1, 30, 8192):
            found = {r.index: r for r in ask(across, tokens)}
            assert found.keys() == expected.keys()
            for i, r in found.items():
                torch.testing.assert_close(r.representations, expected[i].representations, atol=1e-5, rtol=1e-5)
                assert (r.generated is None) == (expected[i].generated is None)
                assert r.generated is None or torch.equal(r.generated, expected[i].generated)
    assert list(across.represent([], [])) == []


def test_labels_are_chosen_through_sessions(client, plm):
    adapter, labels = adapter_of(plm), ["house", "house is small", "dog", "dog is here"]
    across, wire = remote(client)
    for schedule in (GradualUnrolling(), Constant(0.6), NoAdapter()):
        expected = classify(plm, adapter, SOURCES, labels, TASK, schedule)
        result = classify(across, adapter, SOURCES, labels, TASK, schedule)
        torch.testing.assert_close(result.log_probs, expected.log_probs, rtol=0, atol=1e-3)
        assert result.choices == expected.choices
        fast = classify(across, adapter, SOURCES, labels, TASK, schedule, probabilities=False)
        assert fast.choices == expected.choices
    assert {path.split("/")[2] for _, path, _ in wire.requests} <= {"plm", "head", "tokenizer", "sessions"}
    with served(plm, session_rows=3) as limited, pytest.raises(DataError, match="5 rows, 3 are allowed"):
        classify(remote(limited)[0], adapter, SOURCES, labels, TASK, Constant(0.5))


@pytest.mark.parametrize("contexts", ["teacher", "predicted"])
def test_a_memory_is_the_same_as_built_locally(client, plm, tmp_path, contexts):
    across, _ = remote(client, dtype="float16")
    local = build_memory(plm, EXAMPLES, TASK, tmp_path / "local", contexts=contexts)
    built = build_memory(across, EXAMPLES, TASK, tmp_path / "remote", contexts=contexts)
    assert built.pairs == local.pairs
    for mine, theirs in zip(built.view().batches(64), local.view().batches(64), strict=True):
        assert torch.equal(mine.targets, theirs.targets)
        torch.testing.assert_close(mine.representations, theirs.representations, atol=2e-3, rtol=2e-3)


def test_the_short_way_is_the_same_across_the_network(client, plm):
    across, near = PLM(remote(client, dtype="float32")[0]), PLM(plm)
    settings = {"contexts": "predicted", "dtype": "float32"}
    adapter = across.adapt(EXAMPLES, TASK, preset("paper", rank=4, epochs=2, device="cpu"), **settings)
    assert adapter.config.contexts == "predicted"
    texts = across.generate(SOURCES, adapter)
    assert texts == near.generate(SOURCES, adapter)
    with across.use(adapter):
        assert across.generate(SOURCES) == texts


def test_on_policy_rounds_are_the_same_across_the_network(client, plm, tmp_path):
    across, wire = remote(client, dtype="float32")
    settings = {"contexts": "predicted", "targets": "aligned", "dtype": "float32", "rounds": 1}
    training = preset("paper", rank=4, epochs=2, device="cpu")
    PLM(plm).adapt(EXAMPLES, TASK, training, tmp_path / "local", **settings)
    PLM(across).adapt(EXAMPLES, TASK, training, tmp_path / "remote", **settings)
    assert {path.split("/")[2] for _, path, _ in wire.requests} <= {"plm", "head", "tokenizer", "predict", "sessions"}
    built, local = (Memory.open(tmp_path / place / "memory") for place in ("remote", "local"))
    assert [entry.policy is None for entry in built.manifest.inputs] == [True, False]
    assert built.pairs == local.pairs
    for mine, theirs in zip(built.view().batches(64), local.view().batches(64), strict=True):
        assert torch.equal(mine.targets, theirs.targets)
        torch.testing.assert_close(mine.representations, theirs.representations, atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize("settings", [{}, {"num_beams": 3}, {"do_sample": True, "seed": 5}, {"batch_size": 1}], ids=str)
@pytest.mark.parametrize("schedule", [GradualUnrolling(0.9), Constant(0.6)], ids=lambda s: s.name)
def test_generation_gives_the_same_tokens(client, plm, schedule, settings):
    across, wire = remote(client)
    adapter = adapter_of(plm)
    local = generate(plm, adapter, SOURCES, TASK, schedule, **settings)
    assert generate(across, adapter, SOURCES, TASK, schedule, **settings) == local
    opened = sum(r[:2] == ("POST", "/v1/sessions") for r in wire.requests)
    assert opened == sum(r[0] == "DELETE" for r in wire.requests) > 0


def test_an_inspection_is_the_same_across_the_network_and_closes_its_session(client, plm):
    across, wire = remote(client)
    adapter = adapter_of(plm)
    here, there = (inspect_generation(one, adapter, SOURCES[1], TASK, GradualUnrolling(0.9)) for one in (plm, across))
    assert [step.token for step in there.steps] == [step.token for step in here.steps]
    assert there.output == here.output
    assert [r[0] for r in wire.requests].count("DELETE") == 1


def test_a_masked_plm_gives_the_same_tokens_across_the_network(plm, tmp_path):
    """Memory, adapter and generation in the coordinates that the policy gives; the adapter fits no other."""
    Mask.create(tmp_path / "secret.key")
    masked = MaskedPLM(plm, Mask.read(tmp_path / "secret.key"))
    rules = Policy(keys=(key(head="masked"),), mask_secret=str(tmp_path / "secret.key"))
    with served(plm, rules) as client:
        across, _ = remote(client, key=bearer()["Authorization"].split()[1])
        assert across.description == masked.description
        assert torch.equal(across.head().weight, masked.head().weight)
        assert generate(across, None, SOURCES, TASK, NoAdapter()) == generate(plm, None, SOURCES, TASK, NoAdapter())
        memory = build_memory(across, EXAMPLES, TASK, tmp_path / "memory")
        adapter, _ = train(memory, preset("residual", epochs=3, learning_rate=3e-3), tmp_path / "adapter")
        adapted = generate(across, adapter, SOURCES, TASK, Constant(0.9))
        assert adapted == generate(masked, adapter, SOURCES, TASK, Constant(0.9))
        assert adapted != generate(plm, None, SOURCES, TASK, NoAdapter())
    with pytest.raises(MismatchError, match="belongs to another PLM"):
        generate(plm, adapter, SOURCES, TASK, Constant(0.9))


def test_half_precision_keeps_a_token_at_d_values(client, plm):
    across, wire = remote(client, dtype="float16")
    session = across.open_session([[1, 5], [1, 9]])
    session.advance([4, 5])
    payload = len(wire.answers[-1])
    assert 2 * 2 * plm.description.d <= payload <= 2 * 2 * plm.description.d + 200


def test_a_predicted_build_tells_nothing_of_the_targets(client, plm, tmp_path):
    """Every byte that crosses is the same for other targets whose lengths fall into the same bucket of steps."""
    crossed = []
    for words in ("geheim Zeppelin", "Xylophon bar"):
        across, wire = remote(client, dtype="float16")
        lengths = {len(TASK.template.encode(plm.tokenizer, [Example("a", words)])[0].target)}
        build_memory(
            across, [Example(s, words) for s in SOURCES], TASK, tmp_path / words.split()[0], contexts="predicted"
        )
        crossed.append((lengths, wire.requests))
    (first, requests), (second, others) = crossed
    assert first != second  # the lengths differ, and still nothing that crosses does
    assert sorted(requests) == sorted(others)
    sent = b"".join(body for _, _, body in requests)
    assert b"Zeppelin" not in sent
    target = TASK.template.encode(plm.tokenizer, [Example("a", "geheim Zeppelin")])[0].target
    for _, path, body in requests:
        if path == "/v1/predict":
            asked = json.loads(body)
            assert all(step % 8 == 0 for step in asked["steps"])
            parts = [list(target[i : i + 3]) for i in range(len(target) - 2)]
            assert not any(part == p[j : j + 3] for p in asked["prompts"] for part in parts for j in range(len(p)))


@pytest.mark.parametrize("targets", ["position", "aligned"])
def test_how_many_are_asked_for_together_tells_nothing_of_the_targets(client, plm, tmp_path, monkeypatch, targets):
    """Shards are cut where they are full: by exact lengths, they would tell the mean length to a fifth of a token."""
    monkeypatch.setattr("pema.memory.planning.SHARD_BYTES", 100 * plm.description.d_tap * 2)
    crossed, lengths = [], []
    for letters in (18, 20):  # targets of 20 and 22 tokens: 24 steps each, and 32 with a quarter more
        across, wire = remote(client, dtype="float16")
        examples = [Example(SOURCES[i % 6], "z" * letters) for i in range(14)]
        lengths.append(len(TASK.template.encode(plm.tokenizer, examples)[0].target))
        build_memory(across, examples, TASK, tmp_path / str(letters), contexts="predicted", targets=targets)
        crossed.append([r for r in wire.requests if r[1] == "/v1/predict"])
    assert lengths == [20, 22]
    assert sorted(crossed[0]) == sorted(crossed[1])
    assert len(crossed[0]) > 2


def test_a_prompt_is_the_same_whatever_the_target_begins_with(client, plm, tmp_path):
    task = Task("test", Template("say {source}\n"), (), "")
    crossed = []
    for i, target in enumerate(("das Haus", "\ndas Haus", "\tdas Haus")):
        across, wire = remote(client, dtype="float16")
        build_memory(across, [Example(s, target) for s in SOURCES], task, tmp_path / str(i), contexts="predicted")
        crossed.append([json.loads(r[2])["prompts"] for r in wire.requests if r[1] == "/v1/predict"])
    assert crossed[0] == crossed[1] == crossed[2]


@pytest.mark.parametrize("failure", ["connection", 429, 502, 503, 504])
def test_what_may_be_tried_again_is(client, plm, failure):
    def fail_twice(number, request):
        if number % 3 == 0:
            return None
        if failure == "connection":
            raise httpx2.ConnectError("refused", request=request)
        return httpx2.Response(failure, json={"error": {"code": "busy", "message": "Busy.", "remedy": "Wait."}})

    across, _ = remote(client, before=fail_twice, patience=60)
    expected = {r.index: r.representations for r in plm.represent(SEQUENCES, STARTS)}
    for r in across.represent(SEQUENCES, STARTS):
        torch.testing.assert_close(r.representations, expected[r.index], atol=1e-5, rtol=1e-5)
    session = across.open_session([[1, 5, 6]])
    session.advance([7])
    truth = next(iter(plm.represent([[1, 5, 6, 7, 1]], [4]))).representations
    torch.testing.assert_close(session.representations, truth, atol=1e-5, rtol=1e-5)


def test_patience_ends_with_what_to_do(client):
    across, wire = remote(client, patience=1.0)
    wire.before = lambda *_: httpx2.Response(503, text="down")
    with pytest.raises(OwnerError, match=r"POST http://localhost:1/v1/represent failed after .* 'down'.*same command"):
        list(across.represent(SEQUENCES, STARTS))


def test_the_pause_asked_for_is_made(client, monkeypatch):
    pauses = []
    monkeypatch.setattr("pema.owner.client.connection.time.sleep", pauses.append)
    busy = httpx2.Response(429, headers={"Retry-After": "7"}, text="")
    across, wire = remote(client, patience=60)
    wire.before = lambda number, _: busy if number == 2 else None
    list(across.represent(SEQUENCES, STARTS))
    assert pauses == [7.0]


def test_a_lost_session_is_opened_again(client, plm):
    adapter = adapter_of(plm)
    expected = generate(plm, adapter, SOURCES, TASK, GradualUnrolling(0.9), num_beams=2)
    across, wire = remote(client)

    def lose(number, request):
        if number in (5, 9) and request.url.path.endswith("/advance"):
            client.delete(request.url.path.removesuffix("/advance"))

    wire.before = lose
    assert generate(across, adapter, SOURCES, TASK, GradualUnrolling(0.9), num_beams=2) == expected
    assert sum(r[:2] == ("POST", "/v1/sessions") for r in wire.requests) == 3


def test_a_closed_session_does_not_go_on(client):
    session = remote(client)[0].open_session([[1, 5]])
    assert session.held_bytes > 0
    session.close()
    session.close()
    with pytest.raises(DataError, match="the session is closed"):
        session.advance([1])


def test_refusals_name_the_request_and_the_remedy(plm):
    with served(plm, Policy(keys=(key(contexts=("predicted",), head="none"),))) as client:
        with pytest.raises(OwnerError, match=r"/v1/plm: the server refused with 401.*PEMA_API_KEY"):
            remote(client)
        across, _ = remote(client, key=bearer()["Authorization"].split()[1])
        with pytest.raises(OwnerError, match="does not offer teacher contexts to this key, so nothing was sent"):
            list(across.represent(SEQUENCES, STARTS))
        with pytest.raises(OwnerError, match=r"/v1/head: the server refused with 403"):
            across.head()
        with pytest.raises(DataError, match=r"/v1/predict: the server refused with 422.*token 999"):
            list(across.predict([[1, 999]], [8]))


def test_what_exceeds_the_window_is_refused_before_anything_is_sent(client):
    across, wire = remote(client)
    asked, window = len(wire.requests), across.description.max_length
    with pytest.raises(DataError, match=rf"sequence 1 has {window + 1} tokens, the PLM's context window holds"):
        list(across.represent([[1, 5], [1] * (window + 1)], [1, 1]))
    with pytest.raises(DataError, match=rf"prompt 1 has 5 tokens and {window} steps, the PLM's context window holds"):
        list(across.predict([[1, 5], [1] * 5], [1, window]))
    assert len(wire.requests) == asked


def test_the_key_is_read_from_the_environment(plm, monkeypatch):
    monkeypatch.setenv("PEMA_API_KEY", bearer()["Authorization"].split()[1])
    with served(plm, Policy(keys=(key(),))) as client:
        assert remote(client)[0].description == plm.description


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        (lambda a: a | {"wire": 2}, OwnerError, "speaks version 2 of the protocol"),
        (lambda _: ["no"], OwnerError, "speaks version None"),
        (lambda a: a | {"description": a["description"] | {"tap": "norm_input"}}, ConfigError, "at tap 'norm_input'"),
    ],
)
def test_a_server_of_another_kind(client, change, error, match):
    about = client.get("/v1/plm").json()
    with pytest.raises(error, match=match):
        remote(client, before=lambda *_: httpx2.Response(200, json=change(about)))
    with pytest.raises(OwnerError, match="not JSON: check that a pema server runs there"):
        remote(client, before=lambda *_: httpx2.Response(200, text="<html>"))


def test_what_the_server_hands_out_must_be_what_it_describes(client):
    about = client.get("/v1/plm").json()
    for name, get in (("tokenizer_fingerprint", lambda r: r.tokenizer), ("head_fingerprint", lambda r: r.head())):
        description = about["description"] | {name: "other"}
        told = httpx2.Response(200, json=about | {"description": description})
        across, wire = remote(client, before=lambda n, _, told=told: told if n == 1 else None)
        with pytest.raises(MismatchError, match=r"GET .*: the server now has another PLM than it had at the beginning"):
            get(across)
        across._connection.plm = None  # as if the server were an older one, which does not know the header
        with pytest.raises(MismatchError, match="from the one that it describes"):
            get(across)
        assert len(wire.requests) == 3


@pytest.mark.parametrize("name", ["../evil.json", "/etc/evil", "a/b"])
def test_a_tokenizer_file_stays_in_its_folder(client, name):
    across, wire = remote(client)
    wire.before = lambda *_: httpx2.Response(200, json={"files": {name: "{}"}})
    with pytest.raises(OwnerError, match="sent a tokenizer file with the invalid name"):
        _ = across.tokenizer


@pytest.mark.parametrize(
    ("url", "match"),
    [
        ("http://example.org", "is not https: prompts and key would be sent unencrypted"),
        ("ftp://localhost", "is not https"),
        ("http://", "is not https"),
    ],
)
def test_addresses_that_are_refused(url, match):
    with pytest.raises(ConfigError, match=match):
        Connection(url)


def test_settings_that_are_the_owners(tmp_path):
    for settings in ({"device_map": "cuda"}, {"revision": "main"}, {"mask_secret": tmp_path}):
        with pytest.raises(ConfigError, match="is chosen by the PLM's owner"):
            open_plm("https://localhost:1", **settings)
    with pytest.raises(ConfigError, match="unknown dtype 'int8': use auto, float32"):
        open_plm("https://localhost:1", dtype="int8")


def test_a_memory_that_was_begun_goes_on_with_the_server_that_is_back(client, plm, tmp_path):
    """A server that goes away in the middle of a build: what is done stays, and the same command ends it."""
    across, wire = remote(client, patience=1.0)
    wire.before = lambda number, request: (
        httpx2.Response(503, text="") if number > 6 and request.url.path == "/v1/represent" else None
    )
    with pytest.raises(OwnerError, match="run the same command again"):
        build_memory(across, EXAMPLES, TASK, tmp_path / "m", examples_per_shard=1)
    with pytest.raises(ExternalMemoryError, match="incomplete"):
        Memory.open(tmp_path / "m")
    wire.before = None
    built = build_memory(across, EXAMPLES, TASK, tmp_path / "m", examples_per_shard=1)
    whole = build_memory(remote(client)[0], EXAMPLES, TASK, tmp_path / "whole", examples_per_shard=1)
    assert built.manifest.to_dict()["digest"] == whole.manifest.to_dict()["digest"]


def limited(plm, **rules):
    """A server for one key with these rules, and the key."""
    return served(plm, Policy(keys=(key(**rules),))), bearer()["Authorization"].split()[1]


PLACES = ("/v1/plm", "/v1/tokenizer")
"""Endpoints that carry nothing of the data owner's."""


@pytest.mark.parametrize(
    ("rules", "contexts", "match"),
    [
        (
            {"contexts": ("predicted",)},
            "teacher",
            'Build with predicted contexts, or ask .* "teacher"',
        ),
        ({"contexts": ("teacher",)}, "predicted", "Build with teacher contexts, or ask"),
        ({"endpoints": ("plm", "tokenizer", "head", "predict")}, "teacher", 'Build with predicted .* "represent"'),
        ({"endpoints": ("plm", "tokenizer", "head")}, "teacher", r"nothing was sent\. Ask the PLM's owner for a key"),
        ({"head": "none"}, "predicted", "withholds the LM head from this key, and a memory contains it"),
        ({"endpoints": ("plm", "tokenizer", "represent")}, "teacher", "withholds the LM head"),
        ({"tokens_per_day": 12}, "teacher", "an example needs .* tokens at once, and this key has 12 tokens per day"),
    ],
)
def test_what_a_key_can_never_do_is_refused_before_a_text_crosses(plm, tmp_path, rules, contexts, match):
    server, token = limited(plm, **rules)
    with server as client:
        across, wire = remote(client, key=token)
        with pytest.raises(OwnerError, match=match):
            build_memory(across, EXAMPLES, TASK, tmp_path / "m", contexts=contexts)
        assert {path for _, path, _ in wire.requests} <= set(PLACES)
        assert not (tmp_path / "m").exists() or not list((tmp_path / "m").iterdir())
        with pytest.raises(OwnerError, match=match):
            PLM(across).adapt(EXAMPLES, TASK, "paper", tmp_path / "a", contexts=contexts)
        assert {path for _, path, _ in wire.requests} <= set(PLACES)


def test_a_key_for_predicted_contexts_builds_and_generates(plm, tmp_path, capsys):
    server, token = limited(plm, contexts=("predicted",))
    with server as client:
        across, wire = remote(client, key=token)
        build_memory(across, EXAMPLES, TASK, tmp_path / "m", contexts="predicted")
        assert len(generate(across, adapter_of(plm), SOURCES[:2], TASK, max_new_tokens=4)) == 2
        assert "/v1/represent" not in {path for _, path, _ in wire.requests}
        assert "needs sessions" not in capsys.readouterr().err


def test_a_key_without_sessions_hears_it_when_it_builds_and_before_it_generates(plm, tmp_path, capsys):
    server, token = limited(plm, endpoints=("plm", "tokenizer", "head", "predict"))
    with server as client:
        across, wire = remote(client, key=token)
        build_memory(across, EXAMPLES, TASK, tmp_path / "m", contexts="predicted")
        said = " ".join(capsys.readouterr().err.split())
        assert "This key can build and not generate: generation needs sessions" in said
        assert 'for a key with "sessions"' in said
        again, wire = remote(client, key=token)
        match = 'does not let this key open sessions.*nothing was sent: ask the PLM\'s owner for a key with "sessions"'
        with pytest.raises(OwnerError, match=match):
            generate(again, adapter_of(plm), SOURCES[:2], TASK, max_new_tokens=4)
        assert {path for _, path, _ in wire.requests} <= set(PLACES)
        with pytest.raises(OwnerError, match=match):
            again.open_session([[1, 5]])


class Days:
    """Builds under a quota, one per day, each with what it says."""

    def __init__(self, plm, folder, capsys, **rules):
        self.plm, self.folder, self.capsys, self.rules = plm, folder, capsys, rules
        self.said, self.refused = [], []

    def until_it_ends(self):
        """Build once a day: the memory, and the tokens that were charged."""
        server, token = limited(self.plm, endpoints=get_args(Endpoint), **self.rules)
        with server as client:
            now = [1e6]
            client.app.state.lifecycle.service().store.clock = lambda: now[0]
            for _ in range(20):
                with contextlib.suppress(OwnerError):
                    try:
                        memory = build_memory(remote(client, key=token)[0], EXAMPLES, TASK, self.folder, **PREDICTED)
                        text = client.get("/metrics", headers=bearer()).text
                        return memory, re.findall(r'pema_key_tokens_total\{key="acme"\} ([\d.]+)', text)
                    except OwnerError as error:
                        self.refused.append(str(error))
                        raise
                    finally:
                        self.said.append(" ".join(self.capsys.readouterr().err.split()))
                now[0] += 86400 * (1 + 1 / 60)
        raise AssertionError(self.refused)


PREDICTED = {"contexts": "predicted"}


def test_a_build_under_a_small_daily_quota_ends_after_some_days(plm, client, tmp_path, capsys):
    """Its forecast is true, what is answered is paid for once, and the memory is that of one run."""
    whole = build_memory(remote(client)[0], EXAMPLES, TASK, tmp_path / "whole", **PREDICTED)
    days = Days(plm, tmp_path / "m", capsys, tokens_per_day=40)
    memory, (spent,) = days.until_it_ends()
    (one,), (other,) = (each.view().batches(1000) for each in (memory, whole))
    assert torch.equal(one.targets, other.targets)
    # Requests that share a forward pass with others are padded otherwise.
    torch.testing.assert_close(one.representations, other.representations, atol=2e-3, rtol=2e-3)
    forecast = r"requests (\d+) tokens; 40 of this key's 40 tokens per day are left.*?for at least (\d+) more days?\."
    first, *others = [re.search(forecast, text) for text in days.said]
    needed, least = int(first[1]), int(first[2])
    assert float(spent) == needed
    assert least == -(-(needed - 40) // 40) >= 2
    assert least <= len(days.refused) <= 2 * least
    remaining = [int(match[1]) for match in others if match]
    assert [needed, *remaining] == sorted({needed, *remaining}, reverse=True)
    assert others[-1] is None
    for message in days.refused:
        assert re.search(r"The quota allows more in 24 h \d+ min: run the same command again then", message)
        assert "A build keeps every answer that it got, and continues" in message


def test_a_quota_per_minute_is_waited_for(plm, tmp_path, monkeypatch, capsys):
    server, token = limited(plm, tokens_per_minute=60)
    with server as client:
        now = [1e6]
        client.app.state.lifecycle.service().store.clock = lambda: now[0]
        slept = []

        def sleep(seconds):
            slept.append(seconds)
            now[0] += seconds

        monkeypatch.setattr("pema.owner.client.connection.time.sleep", sleep)
        across, _ = remote(client, key=token, patience=60.0)
        build_memory(across, EXAMPLES, TASK, tmp_path / "m", contexts="predicted")
    assert slept
    assert max(slept) < 62
    assert "60 tokens per minute are left. The build waits for the quota" in " ".join(capsys.readouterr().err.split())


def test_an_old_server_says_nothing_of_endpoints_and_quotas(client, plm, tmp_path):
    about = client.get("/v1/plm").json()
    old = {name: value for name, value in about.items() if name not in ("endpoints", "quotas", "requests_per_second")}
    across, _ = remote(client, before=lambda _, r: httpx2.Response(200, json=old) if r.url.path == "/v1/plm" else None)
    build_memory(across, EXAMPLES, TASK, tmp_path / "m", contexts="predicted")
    across.open_session([[1, 5]]).close()
    across, _ = remote(client, before=lambda *_: httpx2.Response(200, json=old | {"contexts": ["predicted"]}))
    with pytest.raises(OwnerError, match="does not offer teacher"):
        list(across.represent(SEQUENCES, STARTS))


@pytest.mark.parametrize("wait", ["inf", "nan", "1e300", "-5", "7"])
def test_a_quota_without_end_is_not_waited_for(client, monkeypatch, wait):
    slept = []
    monkeypatch.setattr("pema.owner.client.connection.time.sleep", slept.append)
    body = {"error": {"code": "quota_spent", "message": "spent.", "remedy": ""}}
    refused = httpx2.Response(429, headers={"Retry-After": wait}, json=body)
    with pytest.raises(OwnerError, match=r"spent\. The quota allows more in .*min: run the same command again then"):
        remote(client, before=lambda *_: refused, patience=60.0)
    assert sum(slept) <= 600
