"""SGLang as the PLM's owner: one server gives the vectors with its answers, also those of a step with its cache."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pema.errors import DataError, OwnerError
from pema.owner.client.connection import SMALL_ANSWER
from pema.owner.engines.plm import EnginePLM, VectorServer
from pema.owner.llamacpp.engine import FLOAT_BYTES
from pema.owner.llamacpp.material import Material
from pema.owner.logprobs.api import TopK

START = "start it with --enable-return-hidden-states"

CHUNKS = "start it with --chunked-prefill-size -1, or a larger one than the context"

ENTRY_BYTES = 128
"""Maximum bytes of a token in an answer, with its log-probability."""

_GREEDY: dict[str, Any] = {
    "temperature": 0.0,
    "top_p": 1.0,
    "top_k": -1,
    "min_p": 0.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "repetition_penalty": 1.0,
    "ignore_eos": True,
}
"""The greedy text, also after a token that ends it. Its log-probabilities are those of a temperature of 1."""


@dataclass(frozen=True)
class Generated:
    """An answer.

    Attributes:
        tokens: (k,) the tokens that were generated.
        computed: (n, d) float32, the vectors of the prompt's tokens that were not in the cache, at least the last.
        following: (k - 1, d) float32, the vectors of the generated tokens but the last.
        top: the likeliest tokens after the prompt; None if none were requested.
    """

    tokens: list[int]
    computed: Tensor
    following: Tensor
    top: TopK | None


class SglangServer(VectorServer):
    """A server of SGLang; see `plm.VectorServer`."""

    def vectors(self, tokens: Sequence[int], d: int) -> Tensor:
        """See `plm.VectorServer`: without the cache, so that the answer does not depend on earlier requests."""
        vectors = self.generate(tokens, 1, d, cached=False).computed
        if len(vectors) != len(tokens):
            raise OwnerError(
                f"{self.where} gives {len(vectors):,} vectors for {len(tokens):,} tokens, the others are in its cache: "
                "start it with --disable-radix-cache."
            )
        return vectors

    def generate(self, prompt: Sequence[int], steps: int, d: int, *, cached: bool, likeliest: int = 0) -> Generated:
        """Request the greedy text after a prompt, with the vectors.

        Args:
            prompt: the context.
            steps: number of tokens.
            d: width of a vector.
            cached: whether the server may use the state that it keeps of the context's beginning.
            likeliest: number of the likeliest tokens after the prompt that are requested.

        Raises:
            OwnerError: the server was not started with hidden states, or answers in another form.
        """
        body: dict[str, Any] = {
            "input_ids": list(prompt),
            "sampling_params": _GREEDY | {"max_new_tokens": steps},
            "return_hidden_states": True,
            "return_logprob": True,
            # The state of tokens whose log-probabilities are requested is computed anew.
            "logprob_start_len": -1 if cached else 0,
            "top_logprobs_num": likeliest,
            "return_text_in_logprobs": False,
            "stream": False,
        }
        entries = (likeliest + 1) * (len(prompt) + steps)
        most = SMALL_ANSWER + FLOAT_BYTES * d * (len(prompt) + steps) + ENTRY_BYTES * entries
        try:
            answer = json.loads(self.connection.request("POST", "/generate", body, most=most))
        except DataError as error:
            if "hidden states" in str(error) or "return_hidden_states" in str(error):
                raise OwnerError(f"{self.where} does not return hidden states ({error}): {START}.") from error
            raise
        except (ValueError, RecursionError) as error:
            raise self._strange("answered with something that is not JSON") from error
        try:
            return self._read(answer["meta_info"], len(prompt), steps, d, likeliest)
        except (KeyError, IndexError, TypeError, ValueError, RuntimeError, OverflowError) as error:
            raise self._strange(f"answered without tokens, probabilities or vectors of {d:,} numbers") from error

    def _read(self, about: dict[str, Any], length: int, steps: int, d: int, likeliest: int) -> Generated:
        tokens = [int(token) for _, token, *_ in about["output_token_logprobs"]]
        first, *following = about["hidden_states"]
        computed = _rows(first, d)
        # A prompt that is read in parts has a list of vectors for each, and the last ones are cut off.
        if len(computed) != length - int(about["cached_tokens"]) or any(isinstance(row[0], list) for row in following):
            raise OwnerError(f"{self.where} reads {length:,} tokens in parts and returns the first only: {CHUNKS}.")
        after = _rows(following, d)
        if len(tokens) != steps or len(after) != steps - 1:
            raise ValueError(f"{len(tokens)} tokens")
        top = None
        if likeliest:
            entries = about["output_top_logprobs"][0]
            if len(entries) != likeliest:
                raise ValueError(f"{len(entries)} log-probabilities")
            top = TopK(
                torch.tensor([[int(token) for _, token, *_ in entries]]),
                torch.tensor([[float(value) for value, *_ in entries]], dtype=torch.float64),
            )
        return Generated(tokens, computed, after, top)

    def _strange(self, what: str) -> OwnerError:
        return OwnerError(f"{self.where} {what}: check that SGLang's server runs there, a recent version.")


def _rows(values: list[list[float]], d: int) -> Tensor:
    """Return the vectors, (n, d) float32; n may be 0."""
    rows = torch.tensor(values, dtype=torch.float32)
    if (values and rows.shape[1:] != (d,)) or not bool(rows.isfinite().all()):
        raise ValueError(f"{tuple(rows.shape)}")
    return rows.reshape(-1, d)


class SglangPLM(EnginePLM):
    """A frozen causal language model that SGLang serves.

    `predicted` contexts are one request a prompt, a step is one request, for the vectors of what is not in the cache.
    """

    engine = "SGLang"
    _server: SglangServer

    def __init__(self, at_hand: Material, server: SglangServer) -> None:
        """Probe the server; see `plm.EnginePLM`."""
        super().__init__(at_hand, server)

    def _likeliest(self, contexts: Sequence[Sequence[int]], count: int) -> TopK:
        d = self._at_hand.heads[0].d
        rows = [self._server.generate(context, 1, d, cached=True, likeliest=count).top for context in contexts]
        given = [row for row in rows if row is not None]
        return TopK(torch.cat([row.tokens for row in given]), torch.cat([row.values for row in given]))

    def _last(self, contexts: Sequence[Sequence[int]], cached: bool) -> Tensor:
        d = self._head.d
        rows = [self._server.generate(context, 1, d, cached=cached).computed[-1] for context in contexts]
        return torch.stack(rows)

    def _greedy(self, prompt: Sequence[int], steps: int) -> tuple[list[int], Tensor]:
        answer = self._server.generate(prompt, steps, self._head.d, cached=False)
        tokens = self._ended(answer.tokens)
        return tokens, torch.cat([answer.computed[-1:], answer.following])[: len(tokens)]
