"""SGLang's server in the process, after its own source: `/generate` with hidden states, with a prefix cache."""

import json

import httpx2
import torch

from pema.owner.client.connection import Connection
from pema.owner.engines.opening import open_engine

URL = "http://127.0.0.1:9"


class FakeSGLang(httpx2.MockTransport):
    """SGLang's server with the model `plm`.

    Attributes:
        vectors: how the vectors are: "plain", "unit", "before norm", or "off" without --enable-return-hidden-states.
        chunk: --chunked-prefill-size.
        stale: whether a prompt whose beginning is in the cache is answered as another one.
        always: whether the cache is used also where log-probabilities of the prompt are requested.
        answers: replaces the JSON of a path by a function of it.
        asked: paths and bodies of the requests.
    """

    def __init__(self, plm, *, vectors="plain", chunk=8192, stale=False, always=False, answers=None):
        super().__init__(self.answer)
        self.plm, self.vectors, self.chunk, self.stale = plm, vectors, chunk, stale
        self.always = always
        self.answers, self.asked, self.seen = answers or {}, [], []

    def connect(self, url):
        return Connection(url, transport=self, patience=0.0)

    def generated(self):
        """The bodies of the requests for texts."""
        return [body for path, body in self.asked if path == "/generate"]

    def answer(self, request):
        path, body = request.url.path, json.loads(request.content) if request.content else {}
        self.asked.append((path, body))
        routes = {"/v1/models": self.models, "/tokenize": self.tokenize, "/generate": self.generate}
        status, value = routes[path](body) if path in routes else (404, {"detail": "Not Found"})
        if path in self.answers:
            value = self.answers[path](value)
        content = value if isinstance(value, bytes) else json.dumps(value).encode()
        return httpx2.Response(status, content=content)

    def models(self, body):
        card = {"id": "tiny", "object": "model", "owned_by": "sglang", "root": "tiny", "parent": None}
        return 200, {"object": "list", "data": [card | {"max_model_len": 128}]}

    def tokenize(self, body):
        tokens = self.plm.tokenizer(body["prompt"]).input_ids
        return 200, {"tokens": tokens, "count": len(tokens), "max_model_len": 128}

    def generate(self, body):
        prompt, params = body["input_ids"], body["sampling_params"]
        assert params["temperature"] == 0.0
        if body["return_hidden_states"] and self.vectors == "off":
            message = (
                "The server is not configured to return hidden states. Please set `--return-hidden-states-mode last`, "
                "`--return-hidden-states-mode full`, or the legacy `--enable-return-hidden-states` flag."
            )
            return 400, {"error": {"message": message}}
        if len(prompt) >= 128:
            message = f"The input ({len(prompt)} tokens) is longer than the model's context length (128 tokens)."
            return 400, {"error": {"message": message}}
        text, steps = list(prompt), params["max_new_tokens"]
        for _ in range(steps):
            text.append(int(self.plm.head()(self.f(text)[-1:])[0].argmax()))
        cached = self.cached(prompt, body)
        f = self.f(text[:-1])
        if self.stale and cached:
            f = f.flip(1)
        hidden = self.given(f)
        start = body["logprob_start_len"]
        parts = [
            hidden[begin : min(begin + self.chunk, len(prompt))].tolist()
            for begin in range(cached, len(prompt), self.chunk)
        ]
        states = [*parts, *hidden[len(prompt) :].tolist()][:steps]  # cut at the number of tokens
        logits = self.plm.head()(self.f(text[:-1])).log_softmax(1)
        about = {
            "id": "5f0f",
            "finish_reason": {"type": "length", "length": steps},
            "prompt_tokens": len(prompt),
            "weight_version": "default",
            "input_token_logprobs": [[None, token, None] for token in (prompt[start:] if start >= 0 else [])],
            "output_token_logprobs": [
                [float(logits[len(prompt) - 1 + step, token]), token, None]
                for step, token in enumerate(text[len(prompt) :])
            ],
            "completion_tokens": steps,
            "cached_tokens": cached,
            "hidden_states": states,
            "e2e_latency": 0.01,
        }
        if body["top_logprobs_num"]:
            values, tokens = logits[len(prompt) - 1].topk(body["top_logprobs_num"])
            entries = zip(values.tolist(), tokens.tolist(), strict=True)
            about["output_top_logprobs"] = [[[value, token, None] for value, token in entries]]
        self.seen.append(text[:-1])
        return 200, {"text": "x", "output_ids": text[len(prompt) :], "meta_info": about}

    def cached(self, prompt, body):
        """How many tokens are not computed again: of the last one the vector is always needed."""
        most = len(prompt) - 1
        if body["return_logprob"] and body["logprob_start_len"] >= 0 and not self.always:
            most = min(most, body["logprob_start_len"])
        return max((common(prompt[:most], other) for other in self.seen), default=0)

    def f(self, tokens):
        """(n, d), f after each token."""
        (result,) = self.plm.represent([[*tokens, 0]], [1])
        return result.representations

    def given(self, f):
        if self.vectors == "unit":
            return f / f.norm(dim=1, keepdim=True)
        if self.vectors == "before norm":
            # What the norm maps to f, of any length.
            return torch.arange(1, len(f) + 1)[:, None] * f / self.plm.model.model.norm.weight.detach()
        return f


def common(a, b):
    """Length of the common beginning."""
    return next((i for i, pair in enumerate(zip(a, b, strict=False)) if pair[0] != pair[1]), min(len(a), len(b)))


def connect(server, folder):
    return open_engine(f"sglang+{URL}#{folder}", server.connect)


def same(a, b):
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
