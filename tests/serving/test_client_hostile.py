"""The client against hostile servers: each answer is refused by name, at once, and nothing of it is run."""

import contextlib
import gzip
import json
import random
import ssl
import time

import pytest
from hostile_server import ANSWERS, URL, Changing, only, raw_server, tokenizer, tokenizer_settings, use
from served import bearer, key, served

from pema.errors import ConfigError, MismatchError, OwnerError, PemaError
from pema.owner.client.connection import Connection
from pema.owner.client.remote import RemotePLM
from pema.owner.loading import load
from pema.serving.policy import Policy


@pytest.fixture(scope="module")
def client(plm):
    # A client that refuses an answer does not know the session that it was about.
    with served(plm, sessions=10_000, heads_per_hour=10_000) as client:
        yield client


def honest(path, status, headers, content):
    return status, headers, content


def test_an_honest_server_is_used(client):
    use(client, honest)


@pytest.mark.parametrize("name", ANSWERS)
def test_a_hostile_answer_is_refused_by_name(client, name):
    began = time.monotonic()
    with pytest.raises(PemaError) as caught:
        use(client, ANSWERS[name])
    message = str(caught.value)
    assert message.isprintable()
    assert len(message) < 2000
    assert time.monotonic() - began < 5


@pytest.mark.parametrize("endpoint", ["plm", "tokenizer", "head", "represent", "predict", "sessions"])
def test_changed_bytes_are_refused_by_name_or_do_no_harm(client, endpoint):
    """Bytes flipped, cut or repeated at random: whatever comes of it, it is a PemaError or an answer."""
    dice = random.Random(endpoint)

    def change(status, headers, content):
        content = bytearray(content)
        for _ in range(dice.randint(1, 4)):
            place = dice.randrange(min(len(content), 400)) if dice.random() < 0.7 else dice.randrange(len(content))
            kind = dice.randrange(3)
            if kind == 0:
                content[place] = dice.randrange(256)
            elif kind == 1:
                del content[place : place + dice.randint(1, 30)]
            else:
                content[place:place] = content[place : place + dice.randint(1, 30)]
            if not content:
                break
        return status, headers, bytes(content)

    said = []
    for _ in range(25):
        with contextlib.suppress(PemaError):
            try:
                use(client, only(f"/v1/{endpoint}", change))
            except PemaError as error:
                said.append(str(error))
                raise
    assert len(said) > 5
    assert all(text.isprintable() for text in said)


CODE = "raise SystemExit('the code of the server has run')"


def test_no_code_that_a_server_sends_is_run_or_asked_about(client, plm, monkeypatch):
    """With `auto_map`, transformers asks on the terminal whether to run the file, and runs it."""
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("somebody was asked"))

    def change(files):
        changed = json.loads(files["tokenizer_config.json"])
        changed |= {"auto_map": {"AutoTokenizer": [None, "evil.Tokenizer"]}, "tokenizer_class": "EvilTokenizer"}
        return files | {"tokenizer_config.json": json.dumps(changed), "evil.py": CODE, "config.json": "{}"}

    connection = Connection(URL, transport=Changing(client, tokenizer(change)))
    tokenizer_ = RemotePLM(URL, connection=connection).tokenizer
    assert tokenizer_("the house").input_ids == plm.tokenizer("the house").input_ids
    assert "auto_map" not in tokenizer_.init_kwargs


@pytest.mark.parametrize("setting", ["vocab_file", "tokenizer_file", "gguf_file", "init_inputs", "added_tokens_file"])
def test_files_of_this_machine_are_not_opened_for_a_server(client, plm, tmp_path, setting):
    secret = tmp_path / "secret.json"
    secret.write_text("{}", encoding="utf-8")
    change = tokenizer_settings(**{setting: [str(secret)] if setting == "init_inputs" else str(secret)})
    found = RemotePLM(URL, connection=Connection(URL, transport=Changing(client, change))).tokenizer
    assert found("a dog").input_ids == plm.tokenizer("a dog").input_ids
    assert str(secret) not in repr(found.init_kwargs)


def test_a_checkpoint_that_brings_code_is_refused_without_asking(tmp_path, monkeypatch, tiny_tokenizer):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("somebody was asked"))
    tiny_tokenizer().save_pretrained(tmp_path)
    config = {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}}
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (tmp_path / "evil.py").write_text(CODE, encoding="utf-8")
    for dtype in (None, "float32"):
        with pytest.raises(OwnerError, match="cannot be loaded as a causal language model"):
            load(tmp_path, dtype=dtype, device_map=None, revision=None)


def test_a_plain_head_is_what_its_fingerprint_says(client):
    with pytest.raises(MismatchError, match="does not match its fingerprint"):
        use(client, ANSWERS["head: other weights"])


def test_the_bucket_is_the_clients_own(client):
    """A server that says that steps need not be padded is told padded ones all the same."""
    told = only("/v1/plm", lambda s, h, c: (s, h, c.replace(b'"predict_bucket":8', b'"predict_bucket":1')))
    wire = Changing(client, told)
    list(RemotePLM(URL, connection=Connection(URL, transport=wire)).predict([[1, 5], [1, 6]], [3, 9]))
    (body,) = [json.loads(body) for path, body in wire.sent if path == "/v1/predict"]
    assert sorted(body["steps"]) == [8, 16]


def test_more_steps_than_the_window_holds_do_not_cross(client):
    wire = Changing(client, honest)
    plm = RemotePLM(URL, connection=Connection(URL, transport=wire))
    with pytest.raises(PemaError, match=r"prompt 1 has 120 tokens and 9 steps"):
        list(plm.predict([[1, 5], [1] * 120], [3, 9]))
    assert [path for path, _ in wire.sent] == ["/v1/plm"]


def test_targets_do_not_cross_to_a_server_that_gives_predicted_contexts_only(plm):
    """What the rule `contexts = ["predicted"]` promises to the data owner: the client sends no target at all."""
    with served(plm, Policy(keys=(key(contexts=("predicted",)),))) as client:
        wire = Changing(client, honest)
        token = bearer()["Authorization"].split()[1]
        across = RemotePLM(URL, connection=Connection(URL, key=token, transport=wire))
        with pytest.raises(OwnerError, match="does not offer teacher contexts to this key, so nothing was sent"):
            list(across.represent([[1, 311, 313]], [1]))
        assert [path for path, _ in wire.sent] == ["/v1/plm"]


OK = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"


def endless():
    yield OK + b"Transfer-Encoding: chunked\r\n\r\n"
    for _ in range(200):
        yield b"10000\r\n" + b" " * 65536 + b"\r\n"


def dripping():
    yield OK + b"Content-Length: 1000\r\n\r\n"
    for _ in range(100):
        yield b" "
        time.sleep(0.05)


def informing():
    for _ in range(300):
        yield b"HTTP/1.1 103 Early Hints\r\n\r\n"


RAW = {
    "no HTTP": b"SSH-2.0-OpenSSH_9.0\r\n",
    "nothing": b"",
    "half a header": b"HTTP/1.1 200 OK\r\nContent-Le",
    "a header of a megabyte": OK + b"X: " + b"a" * (1 << 20) + b"\r\n\r\n",
    "a status of no kind": b"HTTP/1.1 999999 OK\r\n\r\n",
    "less than announced": OK + b"Content-Length: 100\r\n\r\n{}",
    "a terabyte announced": OK + b"Content-Length: 1000000000000\r\n\r\n",
    "10^25 bytes announced": OK + b"Content-Length: 10000000000000000000000000\r\n\r\n",
    "two lengths": OK + b"Content-Length: 2\r\nContent-Length: 3\r\n\r\n{}",
    "endless": endless,
    "one byte at a time": dripping,
    "hints without end": informing,
    "a bomb": OK + b"Content-Encoding: gzip\r\n\r\n" + gzip.compress(b"0" * (50 << 20)),
    "an upgrade": b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\n",
}


@pytest.mark.parametrize("name", RAW)
def test_raw_bytes_of_a_server_are_refused_by_name(name, monkeypatch):
    if name != "one byte at a time":
        monkeypatch.setattr("pema.owner.client.connection.time.sleep", lambda _: None)
    monkeypatch.setattr("pema.owner.client.connection._SLOWEST", 1 << 20)
    with raw_server(RAW[name]) as url:
        began = time.monotonic()
        with pytest.raises(PemaError) as caught:
            RemotePLM(url, connection=Connection(url, patience=0.0, timeout=0.5))
        assert time.monotonic() - began < 4
        assert str(caught.value).isprintable()


@pytest.mark.parametrize("url", ["https://localhost:1/\x7f", "https://[", "https://a b", "https://" + "a" * 70000])
def test_addresses_that_are_none_are_refused_by_name(url):
    with pytest.raises(PemaError):
        Connection(url, patience=0.0).get("/v1/plm")


@pytest.mark.parametrize("secret", ["pema_é", "\x7f", "a b", "a\r\nHost: b"])
def test_a_key_that_no_header_can_hold(secret, monkeypatch):
    monkeypatch.setenv("PEMA_API_KEY", secret)
    with pytest.raises(ConfigError, match="the API key contains invalid characters: check PEMA_API_KEY"):
        Connection(URL)


def test_a_certificate_that_is_not_trusted_is_said_at_once(certificate):
    """No patience makes a certificate good."""
    cert, private = certificate
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(cert, private)
    with raw_server(b"", tls=context) as url:
        began = time.monotonic()
        with pytest.raises(OwnerError, match=r"the server's certificate is not trusted \(.*\).*SSL_CERT_FILE"):
            Connection(url, patience=60).get("/v1/plm")
        assert time.monotonic() - began < 5


def test_a_server_without_tls_behind_https_is_said_at_once():
    with raw_server(b"HTTP/1.1 400 Bad Request\r\n\r\n") as url:
        began = time.monotonic()
        with pytest.raises(OwnerError, match=r"a secure connection cannot be established.*speaks https at this port"):
            Connection(url.replace("http", "https"), patience=60).get("/v1/plm")
        assert time.monotonic() - began < 5


def test_what_a_session_is_answered_must_be_finite(client):
    with pytest.raises(PemaError, match="not finite in float32"):
        use(client, ANSWERS["session: NaN"])
