"""Hostile servers: manipulated answers in the process, and raw bytes on a real connection."""

import contextlib
import json
import socket
import struct
import threading

import httpx2
import torch

from pema.owner.client.connection import Connection
from pema.owner.client.remote import RemotePLM
from pema.owner.wire import pack, unpack

URL = "http://localhost:1"


class Changing(httpx2.BaseTransport):
    """Hands requests to an application in the process, and what `change` makes of its answers back."""

    def __init__(self, client, change):
        self.client, self.change, self.sent = client, change, []

    def handle_request(self, request):
        body = request.read()
        self.sent.append((request.url.path, body))
        headers = {name: value for name, value in request.headers.items() if name != "host"}
        answer = self.client.request(request.method, request.url.path, content=body, headers=headers)
        status, headers, content = self.change(
            request.url.path, answer.status_code, dict(answer.headers), answer.content
        )
        headers = {name: value for name, value in headers.items() if name != "content-length"}
        return httpx2.Response(status, headers=headers, content=content)


def use(client, change):
    """Everything that a data owner asks of a server, with every answer changed."""
    connection = Connection(URL, patience=0.0, transport=Changing(client, change))
    with contextlib.closing(connection):
        plm = RemotePLM(URL, dtype="float32", connection=connection)
        plm.tokenizer("the house")
        plm.head()
        list(plm.represent([[1, 5, 6], [1, 7]], [1, 1]))
        list(plm.predict([[1, 5], [1, 6, 7]], [3, 9]))
        session = plm.open_session([[1, 5], [1, 6]])
        session.advance([4, 5], [1, 0])
        session.close()


def only(path, change):
    """Change the answers of one endpoint."""

    def changed(where, status, headers, content):
        return change(status, headers, content) if where.startswith(path) else (status, headers, content)

    return changed


def with_json(change):
    """Change the JSON of an answer; `change` returns the new value."""
    return lambda status, headers, content: (status, headers, json.dumps(change(json.loads(content))).encode())


def error(code, message):
    return json.dumps({"error": {"code": code, "message": message, "remedy": ""}}).encode()


def with_tensors(change):
    """Change the tensors and texts of an answer in place, or return others."""

    def changed(status, headers, content):
        if not content:
            return status, headers, content
        assert status < 300, content
        tensors, texts = unpack(content)
        tensors, texts = change(tensors, texts) or (tensors, texts)
        return status, headers, pack(tensors, texts)

    return changed


def with_bytes(content):
    """Answer these bytes."""
    return lambda status, headers, _: (status, headers, content)


def header(content, claimed=None):
    """A safetensors file that is a header alone, which may lie about its length."""
    text = content if isinstance(content, bytes) else json.dumps(content).encode()
    return struct.pack("<Q", len(text) if claimed is None else claimed) + text


def described(**changes):
    return only("/v1/plm", with_json(lambda about: about | {"description": about["description"] | changes}))


def limited(**changes):
    return only("/v1/plm", with_json(lambda about: about | {"limits": about["limits"] | changes}))


def settings(**changes):
    """A head with other settings."""

    def change(tensors, texts):
        texts["settings"] = json.dumps(json.loads(texts["settings"]) | changes)

    return only("/v1/head", with_tensors(change))


def replaced(path, name, make):
    """One tensor of an answer replaced by what `make` makes of it; left out where that is None."""

    def change(tensors, texts):
        value = make(tensors[name]) if name in tensors else make(None)
        return ({n: t for n, t in tensors.items() if n != name} | ({} if value is None else {name: value})), texts

    return only(path, with_tensors(change))


def tokenizer(change):
    """Other tokenizer files."""
    return only("/v1/tokenizer", with_json(lambda answer: answer | {"files": change(answer["files"])}))


def tokenizer_settings(**changes):
    """Another tokenizer_config.json."""

    def change(files):
        changed = json.loads(files["tokenizer_config.json"]) | changes
        return files | {"tokenizer_config.json": json.dumps(changed)}

    return tokenizer(change)


STATUSES = (204, 206, 301, 302, 304, 400, 401, 403, 404, 409, 410, 413, 418, 422, 429, 500, 503, 599)
NESTED = b'{"a":' * 100_000 + b"1" + b"}" * 100_000
OTHER = torch.float64

ANSWERS = {
    # What is no JSON, or another one.
    "plm: not JSON": only("/v1/plm", with_bytes(b"<html>")),
    "plm: nothing": only("/v1/plm", with_bytes(b"")),
    "plm: not UTF-8": only("/v1/plm", with_bytes(b"\xff\xfe{")),
    "plm: nested deeply": only("/v1/plm", with_bytes(NESTED)),
    "plm: a number of 5,000 digits": only("/v1/plm", with_bytes(b'{"wire": ' + b"9" * 5000 + b"}")),
    "plm: a list": only("/v1/plm", with_bytes(b"[1]")),
    "plm: a version that is a text": only("/v1/plm", with_json(lambda a: a | {"wire": "\x1b[2J"})),
    "plm: over a megabyte": only("/v1/plm", with_bytes(b" " * (2 << 20))),
    "plm: no description": only("/v1/plm", with_json(lambda a: {n: v for n, v in a.items() if n != "description"})),
    "plm: description is null": only("/v1/plm", with_json(lambda a: a | {"description": None})),
    "plm: no limits": only("/v1/plm", with_json(lambda a: a | {"limits": {}})),
    "plm: limits are a text": only("/v1/plm", with_json(lambda a: a | {"limits": "none"})),
    "plm: no tokens in a request": only(
        "/v1/plm", with_json(lambda a: a | {"limits": a["limits"] | {"batch_tokens": 0}})
    ),
    "plm: infinite tokens": only(
        "/v1/plm", with_bytes(b'{"wire": 1, "description": {}, "limits": {"batch_tokens": 1e999}}')
    ),
    "plm: contexts is a number": only("/v1/plm", with_json(lambda a: a | {"contexts": 3})),
    **{
        f"plm: {what}": only("/v1/plm", with_json(lambda a, quotas=quotas: a | {"quotas": quotas}))
        for what, quotas in {
            "quotas are a number": 3,
            "quotas are an object": {"a": 1},
            "a quota is a text": ["x"],
            "a quota without a limit": [{"unit": "tokens", "seconds": 60, "left": 1}],
            "a quota of 0 tokens": [{"unit": "tokens", "seconds": 60, "limit": 0, "left": 0}],
            "more is left than the limit": [{"unit": "tokens", "seconds": 60, "limit": 5, "left": 6}],
            "a negative rest": [{"unit": "tokens", "seconds": 60, "limit": 5, "left": -6}],
            "a quota of 10^30 tokens": [{"unit": "tokens", "seconds": 60, "limit": 10**30, "left": 1}],
            "a quota in no time": [{"unit": "tokens", "seconds": 0, "limit": 5, "left": 1}],
            "a quota in NaN seconds": [{"unit": "tokens", "seconds": float("nan"), "limit": 5, "left": 1}],
        }.items()
    },
    "plm: endpoints is a number": only("/v1/plm", with_json(lambda a: a | {"endpoints": 3})),
    "plm: escape codes in its name": described(name="\x1b]0;owned\x07"),
    "plm: line breaks in its architecture": described(architecture="a\r\nb"),
    "plm: width 10^9": described(d=10**9, d_tap=10**9),
    "plm: vocabulary 10^13": described(vocabulary_size=10**13),
    "plm: vocabulary -1": described(vocabulary_size=-1),
    "plm: end-of-sequence is a text": described(eos_token_ids="</s>"),
    "plm: parameters is a list": described(parameters=[1]),
    "plm: an unknown field": described(more=1),
    # Tokenizers.
    "tokenizer: no files": only("/v1/tokenizer", with_bytes(b"{}")),
    "tokenizer: a list": only("/v1/tokenizer", with_bytes(b"[]")),
    "tokenizer: files is a text": tokenizer(lambda files: "x"),
    "tokenizer: a text that is a number": tokenizer(lambda files: files | {"tokenizer.json": 3}),
    "tokenizer: a path upwards": tokenizer(lambda files: files | {"../evil.json": "{}"}),
    "tokenizer: an absolute path": tokenizer(lambda files: files | {"/tmp/evil.json": "{}"}),
    "tokenizer: the folder itself": tokenizer(lambda files: files | {"..": "{}"}),
    "tokenizer: an empty name": tokenizer(lambda files: files | {"": "{}"}),
    "tokenizer: a NUL in a name": tokenizer(lambda files: files | {"a\0.json": "{}"}),
    "tokenizer: no tokenizer.json": tokenizer(lambda files: {"tokenizer_config.json": "{}"}),
    "tokenizer: half a tokenizer.json": tokenizer(
        lambda files: files | {"tokenizer.json": files["tokenizer.json"][:99]}
    ),
    "tokenizer: an empty tokenizer.json": tokenizer(lambda files: files | {"tokenizer.json": "{}"}),
    "tokenizer: settings that are a list": tokenizer(lambda files: files | {"tokenizer_config.json": "[]"}),
    "tokenizer: settings nested deeply": tokenizer(lambda files: files | {"tokenizer_config.json": NESTED.decode()}),
    "tokenizer: a lone surrogate": tokenizer(lambda files: files | {"tokenizer.json": "\ud800"}),
    "tokenizer: another one": tokenizer_settings(eos_token="<pad>"),
    "tokenizer: added tokens of no kind": tokenizer_settings(added_tokens_decoder={"x": 3}),
    # Heads.
    "head: not safetensors": only("/v1/head", with_bytes(b"\x80\x04pickle")),
    "head: nothing": only("/v1/head", with_bytes(b"")),
    "head: a header without end": only("/v1/head", with_bytes(header(b"{}", claimed=1 << 62))),
    "head: a header that is a list": only("/v1/head", with_bytes(header(b"[]"))),
    "head: a type that nobody knows": only(
        "/v1/head", with_bytes(header({"weight": {"dtype": "X9", "shape": [0], "data_offsets": [0, 0]}}))
    ),
    "head: a tensor behind the end": only(
        "/v1/head", with_bytes(header({"weight": {"dtype": "F32", "shape": [8], "data_offsets": [0, 32]}}))
    ),
    "head: a shape of 10^18": only(
        "/v1/head", with_bytes(header({"weight": {"dtype": "F32", "shape": [10**9, 10**9], "data_offsets": [0, 0]}}))
    ),
    "head: no weight": replaced("/v1/head", "weight", lambda _: None),
    "head: half its rows": replaced("/v1/head", "weight", lambda w: w[:160].clone()),
    "head: another width": replaced("/v1/head", "weight", lambda w: w[:, :16].clone()),
    "head: integers": replaced("/v1/head", "weight", lambda w: w.int()),
    "head: NaN": replaced("/v1/head", "weight", lambda w: w * torch.nan),
    "head: other weights": replaced("/v1/head", "weight", lambda w: w + 1),
    "head: a bias of another size": replaced("/v1/head", "bias", lambda _: torch.zeros(3)),
    "head: a tensor too many": replaced("/v1/head", "extra", lambda _: torch.zeros(3)),
    "head: a projection that it has not": replaced("/v1/head", "projection", lambda _: torch.zeros(32, 32)),
    "head: no settings": only("/v1/head", with_tensors(lambda tensors, texts: (tensors, {}))),
    "head: settings that are no JSON": only("/v1/head", with_tensors(lambda t, x: (t, x | {"settings": "{"}))),
    "head: settings that are a list": only("/v1/head", with_tensors(lambda t, x: (t, x | {"settings": "[]"}))),
    "head: settings that are null": only("/v1/head", with_tensors(lambda t, x: (t, x | {"settings": "null"}))),
    "head: another fingerprint": only("/v1/head", with_tensors(lambda t, x: (t, x | {"fingerprint": "x"}))),
    "head: a scale that is a text": settings(scale="1"),
    "head: a scale of 0": settings(scale=0.0),
    "head: an infinite scale": settings(scale=float("inf")),
    "head: a soft cap of NaN": settings(soft_cap=float("nan")),
    "head: a norm that nobody knows": settings(norm={"kind": "x", "eps": 1, "offset": 0}),
    "head: a norm that is a text": settings(norm="rms"),
    "head: a norm whose eps is a text": settings(norm={"kind": "rms", "eps": "1", "offset": 0}),
    "head: an unknown setting": settings(more=1),
    # Contexts.
    **{
        f"{path}: {what}": change
        for path in ("/v1/represent", "/v1/predict")
        for what, change in {
            "not safetensors": only(path, with_bytes(b"no")),
            "no tensors": only(path, with_bytes(header({}))),
            "JSON instead": only(path, with_bytes(b'{"error": 3}')),
            "no representations": replaced(path, "representations", lambda _: None),
            "no counts": replaced(path, "counts", lambda _: None),
            "a tensor too many": replaced(path, "more", lambda _: torch.zeros(1)),
            "counts that are floats": replaced(path, "counts", lambda c: c.double()),
            "counts of two dimensions": replaced(path, "counts", lambda c: c[None]),
            "negative counts": replaced(path, "counts", lambda c: torch.stack([c.sum() + 1, c[0] * 0 - 1])),
            "a count of 0": replaced(path, "counts", lambda c: torch.stack([c.sum(), c[0] * 0])),
            "too few counts": replaced(path, "counts", lambda c: c[:1].clone()),
            "counts of 2^62": replaced(path, "counts", lambda c: c * 0 + (1 << 62)),
            "a width too many": replaced(path, "representations", lambda f: torch.cat([f, f[:, :1]], 1)),
            "one row too few": replaced(path, "representations", lambda f: f[1:].clone()),
            "a scalar": replaced(path, "representations", lambda f: f.sum()),
            "float64": replaced(path, "representations", lambda f: f.to(OTHER)),
            "integers": replaced(path, "representations", lambda f: f.long()),
            "booleans": replaced(path, "representations", lambda f: f > 0),
            "NaN": replaced(path, "representations", lambda f: f * torch.nan),
            "infinite": replaced(path, "representations", lambda f: f / 0),
        }.items()
    },
    "/v1/represent: generated tokens": replaced("/v1/represent", "generated", lambda _: torch.zeros(3).long()),
    "/v1/predict: no generated tokens": replaced("/v1/predict", "generated", lambda _: None),
    "/v1/predict: one token too few": replaced("/v1/predict", "generated", lambda g: g[1:].clone()),
    "/v1/predict: tokens that are floats": replaced("/v1/predict", "generated", lambda g: g.float()),
    "/v1/predict: a token outside the vocabulary": replaced("/v1/predict", "generated", lambda g: g + 320),
    "/v1/predict: a negative token": replaced("/v1/predict", "generated", lambda g: g - 400),
    # Sessions.
    **{
        f"session: {what}": only("/v1/sessions", with_tensors(lambda t, x, name=name: (t, x | {"session": name})))
        for what, name in {
            "a path for a name": "../head",
            "an empty name": "",
            "a question in its name": "a?b",
            "a line break in its name": "a\r\nHost: b",
            "a name of 10^5 letters": "a" * 100_000,
        }.items()
    },
    "session: no name": only("/v1/sessions", with_tensors(lambda t, x: (t, {}))),
    "session: no representations": replaced("/v1/sessions", "representations", lambda _: None),
    "session: a row too many": replaced("/v1/sessions", "representations", lambda f: torch.cat([f, f[:1]])),
    "session: float16": replaced("/v1/sessions", "representations", lambda f: f.half()),
    "session: NaN": replaced("/v1/sessions", "representations", lambda f: f * torch.nan),
    "session: a tensor too many": replaced("/v1/sessions", "more", lambda _: torch.zeros(1)),
    # Statuses and errors.
    **{f"status {status}": (lambda *_, status=status: (status, {}, b"")) for status in STATUSES},
    "a redirect elsewhere": lambda *_: (302, {"location": "http://203.0.113.1/"}, b""),
    "an error that is a list": lambda *_: (500, {}, b"[]"),
    "an error without words": lambda *_: (500, {}, b'{"error": null}'),
    "an error nested deeply": lambda *_: (500, {}, b"[" * 60_000),
    "an error of escape codes": lambda *_: (403, {}, error("\x1b[2J", "\x1b]0;x\x07")),
    "an error of ten megabytes": lambda *_: (500, {}, b"x" * (10 << 20)),
    "a lost session that never was": only("/v1/represent", lambda *_: (410, {}, error("session_expired", ""))),
    "Retry-After: inf": lambda *_: (503, {"retry-after": "inf"}, b""),
    "Retry-After: nan": lambda *_: (503, {"retry-after": "nan"}, b""),
    "Retry-After: a text": lambda *_: (503, {"retry-after": "soon"}, b""),
    "compressed": lambda *_: (200, {"content-encoding": "gzip"}, b"\x1f\x8b"),
    "compressed by nobody": lambda *_: (200, {"content-encoding": "\x7f"}, b"x"),
}
"""Hostile answers by name; each is to be refused by a PemaError."""


@contextlib.contextmanager
def raw_server(answer, stall=False, tls=None):
    """A server that sends the pieces of `answer` to whoever connects, and then waits or closes; yields its address."""
    listener = socket.create_server(("127.0.0.1", 0))
    over = threading.Event()

    def serve():
        while not over.is_set():
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            with contextlib.suppress(OSError), connection:
                if tls is not None:
                    connection = tls.wrap_socket(connection, server_side=True)
                connection.settimeout(10)
                connection.recv(1 << 16)
                for piece in answer() if callable(answer) else [answer]:
                    if over.is_set():
                        return
                    connection.sendall(piece)
                if stall:
                    over.wait(10)

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    try:
        yield f"{'http' if tls is None else 'https'}://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        over.set()
        with contextlib.suppress(OSError):
            listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join(10)
