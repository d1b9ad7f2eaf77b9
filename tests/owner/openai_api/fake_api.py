"""An OpenAI-compatible API in this process, which writes a known text and records what it is asked."""

import contextlib
import json
import math
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import torch

WORDS = ["One", " two", " three", " four", " five", " six"]
KEY = "PEMA_TEST_KEY"


class FakeAPI:
    """Answers "One two three four five six" after every prompt, and continues what is written of it.

    `failures` are (status, headers) of the next answers; `change` edits the body of an answer.
    """

    def __init__(self):
        self.requests, self.keys, self.failures, self.change = [], [], [], lambda body: body
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/v1"

    @contextlib.contextmanager
    def running(self):
        thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self.server.shutdown()
            self.server.server_close()
            thread.join(10)

    def answer(self, path, request):
        chat = path.endswith("chat/completions")
        written = ""
        if chat and request["messages"][-1]["role"] == "assistant":
            written = request["messages"][-1]["content"]
        elif not chat:
            written = next((w for n in range(6, 0, -1) if request["prompt"].endswith(w := "".join(WORDS[:n]))), "")
        rest = [w for n, w in enumerate(WORDS) if n >= (len(written.split()) if written else 0)]
        words = rest[: request["max_tokens"]]
        k = request["top_logprobs"] if chat else request["logprobs"]
        content = [self.position(word, k) for word in words]
        usage = {"prompt_tokens": 11, "completion_tokens": len(words), "total_tokens": 11 + len(words)}
        body = {"id": "x", "model": "m", "created": 1, "usage": usage}
        choice = {"index": 0, "finish_reason": "stop" if len(words) == len(rest) else "length"}
        if chat:
            message = {"role": "assistant", "content": "".join(words)}
            choices = [choice | {"message": message, "logprobs": {"content": content}}]
            return body | {"object": "chat.completion", "choices": choices}
        logprobs = {
            "tokens": words,
            "token_logprobs": [each["logprob"] for each in content],
            "top_logprobs": [{one["token"]: one["logprob"] for one in each["top_logprobs"]} for each in content],
            "text_offset": [0] * len(words),
        }
        choices = [choice | {"text": "".join(words), "logprobs": logprobs}]
        return body | {"object": "text_completion", "choices": choices}

    @staticmethod
    def position(word, k):
        """The word has probability 1/2, and the others 1/4, 1/8, ..."""
        names = [word, *(chr(ord("a") + n) for n in range(k - 1))]
        top = [
            {"token": name, "bytes": list(name.encode()), "logprob": (n + 1) * math.log(0.5)}
            for n, name in enumerate(names)
        ]
        return top[0] | {"top_logprobs": top}

    def _handler(api):  # noqa: N805
        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                request = json.loads(self.rfile.read(int(self.headers["content-length"])))
                api.requests.append((self.path, request))
                api.keys.append(self.headers["authorization"])
                status, headers, body = 200, {}, {"error": {"message": "out of order"}}
                if api.failures:
                    status, headers = api.failures.pop(0)
                else:
                    body = api.change(api.answer(self.path, request))
                content = json.dumps(body).encode()
                self.send_response(status)
                for name, value in ({"content-type": "application/json"} | headers).items():
                    self.send_header(name, value)
                self.send_header("content-length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *_):
                pass

        return Handler


class ModelAPI(FakeAPI):
    """Answers as a model of this process writes, which reads every text anew; its tokens are whole characters.

    A chat is written as "role: text" lines; a reply that was begun is continued, unless `continues` is False.
    """

    def __init__(self, plm, vocabulary):
        super().__init__()
        self.plm, self.vocabulary, self.continues, self.says_end = plm, vocabulary, True, True
        self.never = [
            token
            for token, content in enumerate(vocabulary.contents)
            if token not in vocabulary.ends and (not content or "\ufffd" in content.decode("utf-8", "replace"))
        ]

    def log_p(self, ids):
        with torch.no_grad():
            logits = self.plm.model(torch.tensor([ids])).logits[0, -1, : len(self.vocabulary.contents)].double()
        logits[self.never] = -torch.inf
        return torch.log_softmax(logits, -1)

    def ids(self, request, written=""):
        if "prompt" in request:
            return self.plm.tokenizer(request["prompt"] + written).input_ids
        turns = [(each["role"], each["content"]) for each in request["messages"]]
        begun = ""
        if turns[-1][0] == "assistant" and self.continues:
            begun = turns.pop()[1]
        text = "".join(f"{role}: {content}\n" for role, content in turns)
        begun = self.plm.tokenizer(begun + written, add_special_tokens=False).input_ids
        return [*self.plm.tokenizer(text).input_ids, *begun]

    def answer(self, path, request):
        ids, content, tokens, ended = self.ids(request), [], [], False
        prompt = len(ids)
        k = request["top_logprobs"] if path.endswith("chat/completions") else request["logprobs"]
        while len(tokens) < request["max_tokens"] and not ended:
            best = self.log_p(self.ids(request, self.vocabulary.text(tokens))).topk(k)
            top = [self.named(i, p) for i, p in zip(best.indices.tolist(), best.values.tolist(), strict=True)]
            tokens.append(int(best.indices[0]))
            ended = tokens[-1] in self.vocabulary.ends
            if not ended or self.says_end:
                content.append(top[0] | {"top_logprobs": top})
        usage = {"prompt_tokens": prompt, "completion_tokens": len(tokens), "total_tokens": prompt + len(tokens)}
        choice = {"index": 0, "finish_reason": "stop" if ended else "length", "logprobs": {"content": content}}
        text = self.vocabulary.text(tokens)
        choice |= {"message": {"role": "assistant", "content": text}} if "messages" in request else {"text": text}
        return {"id": "x", "model": "m", "created": 1, "object": "x", "usage": usage, "choices": [choice]}

    def named(self, token, log_p):
        content = self.vocabulary.contents[token]
        name = content.decode("utf-8", "replace") or str(self.plm.tokenizer.convert_ids_to_tokens(token))
        return {"token": name, "bytes": list(content) or None, "logprob": log_p}
