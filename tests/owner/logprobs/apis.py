"""An API in the process that answers as vLLM's server does, with a local PLM, and can round, cap and fail."""

import json

import httpx2

from pema.owner.client.connection import Connection
from pema.owner.logprobs.plm import LogProbPLM
from pema.owner.logprobs.recover import recover_head
from pema.owner.sources.served import Served

URL = "http://127.0.0.1:9"


class FakeAPI(httpx2.MockTransport):
    """vLLM's OpenAI-compatible server with the model `plm`.

    Attributes:
        most: maximum number of log-probabilities of a position (`--max-logprobs`); None means all.
        curve: what the server does to logits.
        rounded: what it does to log-probabilities.
        fails_at: number of the completion at which it stops to answer.
        answers: replaces the JSON of a path by a function of it.
        asked: paths and bodies of the requests.
    """

    def __init__(self, plm, *, most=None, curve=lambda x: x, rounded=lambda x: x, fails_at=None, answers=None):
        super().__init__(self.answer)
        self.plm, self.curve, self.rounded, self.fails_at = plm, curve, rounded, fails_at
        self.head = plm.head()
        self.most = most or self.head.vocabulary_size
        self.answers, self.asked = answers or {}, []

    def completions(self):
        """Requests for log-probabilities that were answered."""
        return [body for path, body in self.asked if path == "/v1/completions" and body["logprobs"] <= self.most]

    def answer(self, request):
        path, body = request.url.path, json.loads(request.content) if request.content else {}
        if self.fails_at is not None and len(self.completions()) == self.fails_at and path == "/v1/completions":
            raise httpx2.ReadError("gone")
        self.asked.append((path, body))
        routes = {"/v1/models": self.models, "/tokenize": self.tokenize, "/v1/completions": self.complete}
        status, value = routes[path](body) if path in routes else (404, {"detail": "Not Found"})
        if path in self.answers:
            value = self.answers[path](value)
        content = value if isinstance(value, bytes) else json.dumps(value).encode()
        return httpx2.Response(status, content=content)

    def models(self, body):
        entry = {"id": "tiny", "object": "model", "owned_by": "vllm", "parent": None, "max_model_len": 128}
        return 200, {"object": "list", "data": [entry, entry | {"id": "style", "parent": "tiny"}]}

    def tokenize(self, body):
        return 200, {"tokens": self.plm.tokenizer(body["prompt"]).input_ids, "max_model_len": 128}

    def complete(self, body):
        assert body["max_tokens"] == 1
        assert body["return_tokens_as_token_ids"]
        for field, noun in (("logprobs", "sample"), ("prompt_logprobs", "prompt")):
            if body.get(field, 0) > self.most:
                message = f"Requested {noun} logprobs of {body[field]}, which is greater than max allowed: {self.most}"
                error = {"message": message, "type": "BadRequestError", "param": None, "code": 400}
                return 400, {"error": error}
        prompts = body["prompt"] if isinstance(body["prompt"][0], list) else [body["prompt"]]
        return 200, {
            "id": "cmpl-1",
            "object": "text_completion",
            "created": 1_790_000_000,
            "model": body["model"],
            "choices": [self.choice(i, prompt, body) for i, prompt in enumerate(prompts)],
            "usage": {"prompt_tokens": sum(map(len, prompts)), "completion_tokens": len(prompts)},
        }

    def choice(self, index, prompt, body):
        rows = self.log_probabilities(prompt)
        drawn = 7  # is in the answer besides the likeliest
        top = {f"token_id:{token}": value for token, value in self.likeliest(rows[-1], body["logprobs"], drawn)}
        given = None
        if "prompt_logprobs" in body:
            given = [None] + [
                {
                    str(token): {"logprob": value, "rank": rank, "decoded_token": "x"}
                    for rank, (token, value) in enumerate(self.likeliest(row, body["prompt_logprobs"], token))
                }
                for row, token in zip(rows[:-1], prompt[1:], strict=True)
            ]
        return {
            "index": index,
            "text": "x",
            "logprobs": {
                "text_offset": [0],
                "token_logprobs": [float(rows[-1][drawn])],
                "tokens": [f"token_id:{drawn}"],
                "top_logprobs": [top],
            },
            "finish_reason": "length",
            "stop_reason": None,
            "prompt_logprobs": given,
        }

    def log_probabilities(self, tokens):
        """(n, V), after each token."""
        (result,) = self.plm.represent([[*tokens, 0]], [1])
        logits = self.curve(self.head(result.representations).double())
        return self.rounded(logits.log_softmax(dim=1).float())

    @staticmethod
    def likeliest(row, count, further):
        values, tokens = row.topk(count)
        entries = dict(zip(tokens.tolist(), values.tolist(), strict=True))
        return [*({further: float(row[further])} | entries).items()]


def connected(api):
    return Connection(URL, transport=api, patience=0.0)


def recover(api, output, queries=100, tokenizer=None, **settings):
    tokenizer = tokenizer or api.plm.tokenizer
    return recover_head(URL, tokenizer, output, connection=connected(api), queries=queries, **settings)


def connect(api, folder):
    return LogProbPLM.connect(Served(folder.name, folder, URL), connected(api))
