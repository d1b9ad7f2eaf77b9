"""vLLM as the PLM's owner: a server that pools gives the vectors, another one that completes gives the steps."""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pema.console import note
from pema.errors import DataError, OwnerError
from pema.owner.client.connection import SMALL_ANSWER
from pema.owner.engines.plm import EnginePLM, VectorServer
from pema.owner.llamacpp.material import Material
from pema.owner.logprobs.api import TopK
from pema.owner.logprobs.completions import CompletionsAPI
from pema.owner.logprobs.reading import Reading, require_enough

START = """start it with --runner pooling --convert embed --pooler-config '{"task": "token_embed"}'"""

FEWEST = 5
"""Smallest number of log-probabilities that head(f) is held against."""


class PoolingServer(VectorServer):
    """A server of vLLM with `/pooling`; see `plm.VectorServer`."""

    def vectors(self, tokens: Sequence[int], d: int) -> Tensor:
        """See `plm.VectorServer`."""
        body: dict[str, Any] = {
            "model": self.about.model,
            "task": "token_embed",
            "input": list(tokens),
            "use_activation": False,
            "encoding_format": "base64",
            "embed_dtype": "float32",
            "endianness": "little",
        }
        try:
            # Four bytes of a number are less than six characters.
            content = self.connection.request("POST", "/pooling", body, most=SMALL_ANSWER + 6 * d * len(tokens))
        except OwnerError as error:
            if "refused with 404" in str(error) or "refused with 405" in str(error):
                raise OwnerError(
                    f"{self.where} does not pool: {START}. It is the server that gives vectors."
                ) from error
            raise
        except DataError as error:
            if "task" in str(error):
                raise OwnerError(f"{self.where} pools for another task ({error}): {START}.") from error
            raise
        try:
            encoded = base64.b64decode(json.loads(content)["data"][0]["data"], validate=True)
            vectors = torch.from_numpy(np.frombuffer(encoded, "<f4").reshape(-1, d).astype(np.float32))
        except (ValueError, KeyError, IndexError, TypeError, RecursionError) as error:
            raise self._strange(f"answered without vectors of {d:,} numbers in base64") from error
        if len(vectors) != len(tokens):
            raise OwnerError(
                f"{self.where} gives {len(vectors):,} vectors of {d:,} numbers for {len(tokens):,} tokens: {START}."
            )
        if not bool(vectors.isfinite().all()):
            raise self._strange("answered with vectors that are not finite")
        return vectors

    def _strange(self, what: str) -> OwnerError:
        return OwnerError(f"{self.where} {what}: check that vLLM's server runs there, a recent version.")


class VllmPLM(EnginePLM):
    """A frozen causal language model that vLLM serves.

    A server that completes gives the greedy text of `predicted` contexts in one request, and f of a step from its
    log-probabilities (`Reading`), with its cache. Without one, and for heads with a soft cap, each step requests the
    vectors of the whole context.
    """

    engine = "vLLM"

    def __init__(self, at_hand: Material, pooling: PoolingServer, completions: CompletionsAPI | None) -> None:
        """Probe the servers; see `plm.EnginePLM`.

        Args:
            at_hand: what is known of the model.
            pooling: the server that gives vectors.
            completions: the server that completes, of the same model; None if there is none.
        """
        self._completions: CompletionsAPI | None = completions
        self._reading: Reading | None = None
        if completions is not None and completions.about.context and pooling.about.context:
            shorter = min(completions.about.context, pooling.about.context)
            pooling = PoolingServer(pooling.connection, pooling.about._replace(context=shorter))
        super().__init__(at_hand, pooling)
        if self._reading is None:
            remedy = ": append ?completions=http://host:port with a server that completes." if not completions else "."
            note(f"{pooling.where} reads the whole context again at each step of generation{remedy}")

    def _likeliest(self, contexts: Sequence[Sequence[int]], count: int) -> TopK | None:
        api = self._completions
        if api is None:
            return None
        if api.most < FEWEST:
            raise OwnerError(
                f"{api.where} returns the log-probabilities of {api.most:,} tokens: start vLLM with --max-logprobs -1."
            )
        return api.likeliest(contexts, min(count, api.most), cached=False)

    def _prepare_steps(self) -> bool:
        if self._completions is None or self._head.soft_cap is not None:
            return False
        require_enough(self._completions, self._head, self._at_hand.name)
        self._reading = Reading(self._completions, self._head, [])
        return True

    def _last(self, contexts: Sequence[Sequence[int]], cached: bool) -> Tensor:
        if self._reading is not None:
            return self._reading.last(contexts, cached)
        return torch.stack([self._server.vectors(context, self._head.d)[-1] for context in contexts])

    def _greedy(self, prompt: Sequence[int], steps: int) -> tuple[list[int], Tensor]:
        if self._completions is not None:
            tokens = self._ended(self._completions.greedy(prompt, steps))
            return tokens, self._contexts([*prompt, *tokens[:-1]], len(prompt))
        tokens, rows = [], list[Tensor]()
        while len(tokens) < steps and (not tokens or tokens[-1] not in self._at_hand.ends):
            rows.append(self._last([[*prompt, *tokens]], bool(tokens)))
            tokens.append(int(self._head(rows[-1]).argmax()))
        return tokens, torch.cat(rows)
