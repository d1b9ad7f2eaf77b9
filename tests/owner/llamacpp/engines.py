"""An engine in the process that answers as llama.cpp's server does, with a local PLM, and can be given faults."""

import json

import httpx2
import torch

from pema.owner.client.connection import Connection
from pema.owner.llamacpp.plm import LlamaCppPLM
from pema.owner.sources.served import Served

URL = "http://127.0.0.1:9"


class FakeEngine(httpx2.MockTransport):
    """llama.cpp's server with the model `plm`.

    Attributes:
        vectors: how the vectors are: "plain", "unit", "before norm", "pooled", or "none" without --embeddings.
        batch: maximum tokens of a request for vectors.
        stale: whether a completion from the cache answers as after another text.
        answers: replaces the JSON of a path by a function of it.
        asked: paths and bodies of the requests.
    """

    def __init__(self, plm, *, vectors="plain", batch=128, stale=False, answers=None, meta=None):
        super().__init__(self.answer)
        self.plm, self.vectors, self.batch, self.stale = plm, vectors, batch, stale
        self.answers, self.meta, self.asked = answers or {}, meta or {}, []
        self.head = plm.head()

    def answer(self, request):
        path = request.url.path
        body = json.loads(request.content) if request.content else {}
        self.asked.append((path, body))
        status, value = self.routes()[path](body)
        if path in self.answers:
            value = self.answers[path](value)
        content = value if isinstance(value, bytes) else json.dumps(value).encode()
        return httpx2.Response(status, content=content)

    def routes(self):
        size, d = self.head.weight.shape
        meta = {"n_vocab": size, "n_embd": d} | self.meta
        return {
            "/props": lambda body: (200, {"default_generation_settings": {"n_ctx": self.plm.max_length}}),
            "/v1/models": lambda body: (200, {"data": [{"meta": meta}]}),
            "/lora-adapters": lambda body: (200, []),
            "/tokenize": lambda body: (200, {"tokens": self.plm.tokenizer(body["content"]).input_ids}),
            "/apply-template": self.chat,
            "/embedding": self.embedding,
            "/completion": self.completion,
        }

    def chat(self, body):
        text = self.plm.tokenizer.apply_chat_template(body["messages"], tokenize=False, add_generation_prompt=True)
        return 200, {"prompt": text}

    def f(self, tokens):
        """(n, d), f after each token."""
        (result,) = self.plm.represent([[*tokens, 0]], [1])
        return result.representations

    def embedding(self, body):
        tokens = body["content"]
        if self.vectors == "none":
            return 501, refusal(501, "This server does not support embeddings. Start it with `--embeddings`")
        if len(tokens) > self.batch:
            return 500, refusal(500, f"input ({len(tokens)} tokens) is too large to process. increase the batch size")
        f = self.f(tokens)
        if self.vectors == "unit":
            f = f / f.norm(dim=1, keepdim=True)
        elif self.vectors == "before norm":
            seen = []
            handle = self.plm.model.model.norm.register_forward_pre_hook(lambda _, given: seen.append(given[0][0]))
            with torch.no_grad():
                self.plm.model(torch.tensor([tokens]))
            handle.remove()
            f = seen[0]
        elif self.vectors == "pooled":
            f = f.mean(0, keepdim=True)
        return 200, [{"index": 0, "embedding": f.tolist()}]

    def completion(self, body):
        prompts = body["prompt"]
        if isinstance(prompts[0], int):
            return 200, self.complete(prompts, body, 0)
        # In the order in which they end.
        return 200, [self.complete(prompt, body, i) for i, prompt in enumerate(prompts)][::-1]

    def complete(self, prompt, body, index):
        assert body["n_predict"] == 1
        context = prompt[: len(prompt) // 2] if body["cache_prompt"] and self.stale else prompt
        logits = self.head(self.f(context)[-1:])[0].double()
        lifted = logits.clone()
        for token, bias in body["logit_bias"]:
            lifted[token] += bias
        return {"index": index, "completion_probabilities": [self.probabilities(logits, lifted, body)]}

    def probabilities(self, logits, lifted, body):
        if body["post_sampling_probs"]:
            values, tokens = lifted.topk(body["top_k"])
            entries = zip(tokens.tolist(), values.softmax(0).tolist(), strict=True)
            return {"top_probs": [{"id": token, "prob": value} for token, value in entries]}
        values, tokens = logits.log_softmax(0).topk(body["n_probs"])
        entries = zip(tokens.tolist(), values.tolist(), strict=True)
        return {"top_logprobs": [{"id": token, "logprob": value} for token, value in entries]}


def refusal(code, message):
    return {"error": {"code": code, "message": message, "type": "error"}}


def connect(file, engine, name="tiny"):
    """A PLM on an engine, with what is at hand in `file`."""
    return LlamaCppPLM(Served(name, file, URL), Connection(URL, transport=engine, patience=0.0))
