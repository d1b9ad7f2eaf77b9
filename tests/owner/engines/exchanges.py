"""Exchanges with vLLM's servers: recorded from real ones, and replayed in the tests."""

import json
from pathlib import Path

import httpx2

from pema.owner.client.connection import Connection

FILE = Path(__file__).parent / "vllm.jsonl"
POOLING, COMPLETIONS = "https://pooling:8001", "https://completions:8000"


def request_of(request):
    """What identifies a request: server, method, path and body."""
    body = json.loads(request.content) if request.content else None
    return {"server": request.url.host, "method": request.method, "path": request.url.path, "body": body}


class Replay(httpx2.MockTransport):
    """Both servers, as they answered; a request that was not recorded is an error.

    Attributes:
        changes: for a server and a path, what replaces the status and the answer: a function of both.
        asked: the requests.
    """

    def __init__(self, changes=None):
        super().__init__(self.answer)
        self.changes, self.asked = changes or {}, []
        lines = FILE.read_text(encoding="utf-8").splitlines()
        exchanges = [json.loads(line) for line in lines]
        self.answers = {json.dumps(each["request"]): (each["status"], each["answer"]) for each in exchanges}

    def answer(self, request):
        asked = request_of(request)
        self.asked.append(asked)
        assert json.dumps(asked) in self.answers, f"not recorded: {asked}"
        status, value = self.answers[json.dumps(asked)]
        change = self.changes.get((asked["server"], asked["path"]))
        status, value = (status, value) if change is None else change(status, value)
        content = value if isinstance(value, bytes) else json.dumps(value).encode()
        return httpx2.Response(status, content=content)

    def connect(self, url):
        return Connection(url, transport=self, patience=0.0)

    def recorded(self):
        """The requests with their status and answer."""
        return [(json.loads(request), answer) for request, answer in self.answers.items()]

    def paths(self):
        return [(each["server"], each["path"]) for each in self.asked]


class Recorder(httpx2.BaseTransport):
    """Forwards requests to running servers, and keeps the exchanges."""

    def __init__(self, urls):
        self.clients = {name: httpx2.Client(base_url=url, timeout=600.0) for name, url in urls.items()}
        self.kept = {}

    def handle_request(self, request):
        asked = request_of(request)
        client = self.clients[asked["server"]]
        response = client.request(asked["method"], asked["path"], json=asked["body"])
        answer = response.json()
        for entry in answer.get("data", ()):
            if "root" in entry:
                entry["root"] = entry["id"]  # a path of this machine
        self.kept[json.dumps(asked)] = {"request": asked, "status": response.status_code, "answer": answer}
        return httpx2.Response(response.status_code, content=response.content)

    def connect(self, url):
        return Connection(url, transport=self, patience=0.0)

    def write(self):
        exchanges = self.kept.values()
        lines = [json.dumps(exchange, ensure_ascii=False, separators=(",", ":")) for exchange in exchanges]
        FILE.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
