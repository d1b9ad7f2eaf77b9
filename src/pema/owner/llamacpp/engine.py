"""The requests that llama.cpp's server answers, and the validation of its answers, which are untrusted.

Every request sets all that decides its answer, so that the defaults that a server was started with do not matter.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pema.errors import DataError, OwnerError
from pema.owner.client.connection import SMALL_ANSWER, Connection
from pema.schema import short

FLOAT_BYTES = 32
"""Maximum bytes of a number in an answer, with what separates it from the next."""

TOKEN_BYTES = 2048
"""Maximum bytes of a token in an answer, with its text, its bytes and its log-probability."""

LIFT = 300.0
"""Added to the logits of chosen tokens, so that the engine returns exactly their probabilities.

It is more than the range of the logits of a language model, and small enough that float32 keeps four decimal places."""

_PLAIN: dict[str, Any] = {"n_predict": 1, "stream": False, "logit_bias": [], "stop": [], "n_probs": 0}


class Properties(NamedTuple):
    """What a server says of its model; None for what an older version does not say.

    Attributes:
        context: maximum tokens of a context.
        vocabulary_size: number of tokens.
        d: width of a representation.
        parameters: number of weights.
        bytes: size of the weights.
    """

    context: int
    vocabulary_size: int | None
    d: int | None
    parameters: int | None
    bytes: int | None


@dataclass(frozen=True)
class Engine:
    """A server of llama.cpp.

    Attributes:
        connection: the connection to it.
        ended: returns how its process has ended, if it was started here and has; see `process.Server`.
    """

    connection: Connection
    ended: Callable[[], str | None] = lambda: None

    def properties(self) -> Properties:
        """Ask what the server runs, and refuse one that changes its model.

        Raises:
            OwnerError: no server of llama.cpp answers, or it applies a LoRA adapter.
        """
        try:
            context = int(self._ask("GET", "/props")["default_generation_settings"]["n_ctx"])
            meta = (self._ask("GET", "/v1/models").get("data") or [{}])[0].get("meta") or {}
            numbers = [meta.get(name) for name in ("n_vocab", "n_embd", "n_params", "size")]
            properties = Properties(context, *(None if number is None else int(number) for number in numbers))
            adapters = [each for each in self._ask("GET", "/lora-adapters", kind=list) if float(each["scale"])]
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise self._strange("does not describe its model as llama.cpp's server does") from error
        if context < 2:
            raise self._strange("does not describe its model as llama.cpp's server does")
        if adapters:
            raise OwnerError(
                f"{self.connection.url} applies a LoRA adapter ({short(adapters[0].get('path', ''))}): start it "
                "without one."
            )
        return properties

    def tokens(self, text: str) -> list[int]:
        """Return the tokens of a text, with those that begin or end every text."""
        answer = self._ask("POST", "/tokenize", {"content": text, "add_special": True, "parse_special": True})
        return self._integers(answer.get("tokens"))

    def chat(self, messages: Sequence[dict[str, str]]) -> str:
        """Return messages in the chat template of the model, up to where its reply begins."""
        prompt = self._ask("POST", "/apply-template", {"messages": list(messages)}).get("prompt")
        if not isinstance(prompt, str):
            raise self._strange("answered a chat with something that is not a text")
        return prompt

    def vectors(self, tokens: Sequence[int], d: int) -> Tensor | None:
        """Return one vector a token, (n, d) float32, or one for all of them, as the server pools them.

        Returns:
            None if the server gives none, or none for so many tokens.
        """
        body = {"content": list(tokens), "embd_normalize": -1}
        try:
            answer = self._ask("POST", "/embedding", body, FLOAT_BYTES * d * len(tokens), kind=list)
        except (OwnerError, DataError) as error:
            if any(words in str(error) for words in ("does not support embeddings", "too large to process")):
                return None
            raise
        try:
            vectors = torch.tensor(answer[0]["embedding"], dtype=torch.float32).reshape(-1, d)
        except (KeyError, IndexError, TypeError, ValueError, RuntimeError, OverflowError) as error:
            raise self._strange(f"answered with vectors that do not have {d:,} numbers each") from error
        if len(vectors) not in (1, len(tokens)) or not bool(vectors.isfinite().all()):
            raise self._strange(f"answered with {len(vectors):,} vectors, or infinite ones, for {len(tokens):,} tokens")
        return vectors

    def likeliest(
        self, prompt: Sequence[int], count: int, drawn: int, *, cached: bool = False
    ) -> tuple[list[int], Tensor]:
        """Return the likeliest next tokens in order and their log-probabilities, (count,) float64.

        Args:
            prompt: the context.
            count: number of tokens.
            drawn: the token that is made to follow, a complete text: without one the engine gives no probabilities.
            cached: whether the engine may use the state that it keeps of the context's beginning.
        """
        body = _PLAIN | {
            "prompt": list(prompt),
            "cache_prompt": cached,
            "samplers": ["top_k"],
            "top_k": 1,
            "n_probs": count,
            "post_sampling_probs": False,
            "logit_bias": [[drawn, LIFT]],
        }
        answer = self._ask("POST", "/completion", body, TOKEN_BYTES * count)
        return self._probabilities(answer, "top_logprobs", "logprob", count)

    def chosen(self, prompts: Sequence[Sequence[int]], tokens: Sequence[int], *, cached: bool) -> Tensor:
        """Return the log-probabilities of chosen next tokens after each prompt, (rows, k) float64, up to a constant.

        Args:
            prompts: the contexts.
            tokens: (k,) the tokens, each a complete text.
            cached: whether the engine may use the state that it keeps of a context's beginning.
        """
        body = _PLAIN | {
            "prompt": [list(prompt) for prompt in prompts],
            "cache_prompt": cached,
            "n_probs": len(tokens),
            "post_sampling_probs": True,
            "samplers": ["top_k"],
            "top_k": len(tokens),
            "logit_bias": [[token, LIFT] for token in tokens],
        }
        answers = self._ask("POST", "/completion", body, TOKEN_BYTES * len(tokens) * len(prompts), kind=(dict, list))
        if isinstance(answers, dict):  # one prompt
            answers = [answers]
        if len(answers) != len(prompts):
            raise self._strange(f"answered {len(answers):,} of {len(prompts):,} prompts")
        columns = {token: column for column, token in enumerate(tokens)}
        result = torch.zeros(len(prompts), len(tokens), dtype=torch.float64)
        rows = sorted(answers, key=lambda answer: answer.get("index", 0) if isinstance(answer, dict) else 0)
        for row, answer in enumerate(rows):
            given, values = self._probabilities(answer, "top_probs", "prob", len(tokens))
            if not columns.keys() >= set(given):
                raise self._strange("answered with probabilities of other tokens than those that were requested")
            result[row, [columns[token] for token in given]] = values.log()
        return result

    def _probabilities(self, answer: Any, field: str, name: str, count: int) -> tuple[list[int], Tensor]:  # noqa: ANN401
        try:
            entries = answer["completion_probabilities"][0][field]
            tokens = self._integers([entry["id"] for entry in entries])
            values = torch.tensor([float(entry[name]) for entry in entries], dtype=torch.float64)
        except (KeyError, IndexError, TypeError, ValueError, OverflowError) as error:
            raise self._strange(f"answered without the {count:,} probabilities that were requested") from error
        if len(set(tokens)) != count or not bool(values.isfinite().all()):
            raise self._strange(f"answered without the {count:,} probabilities that were requested")
        return tokens, values

    def _ask(
        self,
        method: str,
        path: str,
        body: dict[str, Any] | None = None,
        most: int = 0,
        *,
        kind: type | tuple[type, ...] = dict,
    ) -> Any:  # noqa: ANN401
        """Send a request and return the JSON of the answer, of at most `most` bytes and a fixed part."""
        try:
            content = self.connection.request(method, path, body, most=SMALL_ANSWER + most)
        except OwnerError as error:
            how = self.ended()
            if how is None:
                raise
            raise OwnerError(f"the server of llama.cpp {how}: check that there is enough memory.") from error
        try:
            answer = json.loads(content)
        except (ValueError, RecursionError) as error:
            raise self._strange("answered with something that is not JSON") from error
        if not isinstance(answer, kind):
            raise self._strange(f"answered {path} in another form than llama.cpp's server")
        return answer

    def _integers(self, values: object) -> list[int]:
        if not isinstance(values, list) or not all(type(value) is int and 0 <= value < 1 << 31 for value in values):
            raise self._strange("answered with tokens that are not numbers")
        return values

    def _strange(self, what: str) -> OwnerError:
        return OwnerError(f"{self.connection.url} {what}: check that llama.cpp's server runs there, a recent version.")


def parts(contexts: Sequence[Sequence[int]], tokens: int) -> Iterator[Sequence[Sequence[int]]]:
    """Split contexts, in order, into parts of at most `tokens` tokens, with one to come for each context."""
    begin = count = 0
    for end, context in enumerate(contexts):
        count += len(context) + 1
        if end > begin and count > tokens:
            yield contexts[begin:end]
            begin, count = end, len(context) + 1
    yield contexts[begin:]
