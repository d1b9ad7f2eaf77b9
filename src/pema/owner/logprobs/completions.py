"""An OpenAI-compatible server with log-probabilities of many tokens, as vLLM's: requests and validation of the answers.

Every request sets all that decides its answer, so that the defaults that a server was started with do not matter. The
answers name tokens by number (`return_tokens_as_token_ids`), since texts of tokens are ambiguous.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pema.errors import DataError, OwnerError
from pema.owner.client.connection import SMALL_ANSWER, Connection
from pema.owner.logprobs.api import About, TopK
from pema.schema import short

ENTRY_BYTES = 1024
"""Maximum bytes of a token in an answer, with its number, its text and its log-probability."""

FEWEST = -9000.0
"""Log-probabilities below are those of tokens that the server excludes (vLLM writes -9999)."""

_HUGE = 1 << 24
_LIMIT = re.compile(r"max(?:imum)?(?: allowed)?:? (\d+)")
_PLAIN: dict[str, Any] = {
    "max_tokens": 1,
    "stream": False,
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": -1,
    "min_p": 0.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "repetition_penalty": 1.0,
    "return_tokens_as_token_ids": True,
}


@dataclass(frozen=True)
class CompletionsAPI:
    """A server with `/v1/completions`; see `api.LogProbAPI`.

    Attributes:
        connection: the connection to it.
        about: what it says of its model.
        most: see `api.LogProbAPI`.
    """

    connection: Connection
    about: About
    most: int
    entry_bytes: int = 64

    @classmethod
    def of(cls, connection: Connection, model: Mapping[str, Any], begin: Sequence[int], size: int) -> CompletionsAPI:
        """Ask a server how many log-probabilities it returns, with a request that asks for too many.

        Args:
            connection: the connection to it.
            model: its entry in `/v1/models`.
            begin: a context.
            size: number of tokens of the tokenizer at hand.

        Raises:
            OwnerError: it returns none, or does not say how many.
        """
        context = model.get("max_model_len")
        about = About("completions", str(model["id"]), None, None, context if type(context) is int else None)
        asked = cls(connection, about, _HUGE)
        try:
            answer = asked._complete([list(begin)], {"logprobs": _HUGE}, _HUGE)
        except DataError as error:
            limit = _LIMIT.search(str(error))
            if limit is None:
                raise OwnerError(
                    f"{asked.where} does not say how many log-probabilities it returns: {error}"
                ) from error
            return cls(connection, about, int(limit[1]))
        count = len(asked._entries(answer[0]))
        # A token that was drawn may be in it besides the likeliest.
        return cls(connection, about, count if count >= size else count - 1)

    @property
    def where(self) -> str:
        """Its address."""
        return self.connection.url

    def tokens(self, text: str) -> list[int] | None:
        """See `api.LogProbAPI.tokens`; vLLM says, others need not."""
        return tokens_of(self.connection, self.about.model, text)

    def chat(self, messages: Sequence[dict[str, str]]) -> None:
        """See `api.LogProbAPI.chat`; it does not say."""

    def likeliest(self, contexts: Sequence[Sequence[int]], count: int, *, cached: bool) -> TopK:
        """See `api.LogProbAPI.likeliest`; a server decides itself what it keeps."""
        choices = self._complete(contexts, {"logprobs": count}, count * len(contexts))
        return self._top([self._entries(choice) for choice in choices], count)

    def chosen(self, contexts: Sequence[Sequence[int]], tokens: Sequence[int], *, cached: bool) -> Tensor | None:
        """See `api.LogProbAPI.chosen`: vLLM's `logprob_token_ids` are 128 at most, so the likeliest are used."""
        return None

    def along(self, tokens: Sequence[int], start: int, count: int) -> TopK:
        """See `api.ReadsSequences.along`: from the log-probabilities of the prompt, and of the token after it."""
        body = {"logprobs": count, "prompt_logprobs": count}
        (choice,) = self._complete([tokens], body, count * (len(tokens) + 1))
        try:
            given = choice["prompt_logprobs"]
            if len(given) != len(tokens):
                raise ValueError(f"{len(given)} positions for {len(tokens)} tokens")
            rows = [{int(token): float(entry["logprob"]) for token, entry in each.items()} for each in given[start:]]
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise self._strange("answered without the log-probabilities of the prompt") from error
        return self._top([*rows, self._entries(choice)], count)

    def greedy(self, prompt: Sequence[int], steps: int) -> list[int]:
        """Return the likeliest tokens after a prompt one after the other, also after one that ends a text."""
        body = {"logprobs": 0, "temperature": 0.0, "max_tokens": steps, "ignore_eos": True}
        (choice,) = self._complete([prompt], body, steps)
        try:
            tokens = [int(name.removeprefix("token_id:")) for name in choice["logprobs"]["tokens"]]
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise self._strange("answered without the tokens of a text, or with tokens that are not numbers") from error
        if len(tokens) != steps:
            raise self._strange(f"answered with {len(tokens):,} tokens, {steps:,} were requested")
        return tokens

    def _complete(self, contexts: Sequence[Sequence[int]], body: dict[str, Any], entries: int) -> list[dict[str, Any]]:
        content = _PLAIN | {"model": self.about.model, "prompt": [list(context) for context in contexts]} | body
        # A token that was drawn or given is in the answer too, so that there may be one more for a position.
        most = SMALL_ANSWER + 2 * ENTRY_BYTES * entries
        answer = self.connection.request("POST", "/v1/completions", content, most=most)
        try:
            choices = json.loads(answer)["choices"]
            choices = sorted(choices, key=lambda choice: choice["index"])
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise self._strange("answered /v1/completions in another form than vLLM") from error
        if len(choices) != len(contexts):
            raise self._strange(f"answered {len(choices):,} of {len(contexts):,} prompts")
        return choices

    def _entries(self, choice: Mapping[str, Any]) -> dict[int, float]:
        try:
            entries = choice["logprobs"]["top_logprobs"][0]
            return {int(name.removeprefix("token_id:")): float(value) for name, value in entries.items()}
        except (KeyError, IndexError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise self._strange("answered without log-probabilities, or with tokens that are not numbers") from error

    def _top(self, rows: Sequence[Mapping[int, float]], count: int) -> TopK:
        """Return the `count` likeliest of each row: a further token is the one that was drawn or given."""
        ordered = [sorted(row.items(), key=lambda entry: -entry[1])[:count] for row in rows]
        wrong = next((row for row in ordered if len(row) != count), None)
        if wrong is not None:
            raise self._strange(f"answered with {len(wrong):,} log-probabilities, {count:,} were requested")
        tokens = torch.tensor([[token for token, _ in row] for row in ordered])
        values = torch.tensor([[value for _, value in row] for row in ordered], dtype=torch.float64)
        if not bool(values.isfinite().all()) or int(tokens.min()) < 0:
            raise self._strange("answered with log-probabilities that are not finite, or with negative tokens")
        if float(values.min()) < FEWEST:
            token = int(tokens[values < FEWEST][0])
            raise OwnerError(
                f"{self.where} excludes token {token} of {short(self.about.model)}: start the server without a list of "
                "allowed tokens or a structure of the output."
            )
        return TopK(tokens, values)

    def _strange(self, what: str) -> OwnerError:
        return OwnerError(f"{self.where} {what}: check that vLLM's server, or one like it, runs there.")


def tokens_of(connection: Connection, model: str, text: str) -> list[int] | None:
    """Return the tokens of a text, with those that begin every text; None if the server does not say."""
    body = {"model": model, "prompt": text, "add_special_tokens": True}
    with contextlib.suppress(OwnerError, DataError, KeyError, TypeError, ValueError):
        tokens = json.loads(connection.request("POST", "/tokenize", body))["tokens"]
        if isinstance(tokens, list) and all(type(token) is int for token in tokens):
            return tokens
    return None
