"""llama.cpp's server as an API that returns log-probabilities: its vectors are never requested."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pema.owner.llamacpp.engine import Engine, parts
from pema.owner.logprobs.api import About, TopK


@dataclass(frozen=True)
class LlamaCppAPI:
    """A running server of llama.cpp; see `api.LogProbAPI`.

    Its logit bias lifts chosen tokens, so that it returns exactly theirs.

    Attributes:
        engine: the server.
        about: what it says of its model.
        most: see `api.LogProbAPI`; it returns all.
        drawn: an ordinary token: one that ends a text would leave the answer without probabilities.
    """

    engine: Engine
    about: About
    most: int
    drawn: int
    entry_bytes: int = 96

    @classmethod
    def of(cls, engine: Engine, model: str, tokens: int, drawn: int) -> LlamaCppAPI:
        """Ask a server what it runs.

        Args:
            engine: the server.
            model: the name of its model.
            tokens: number of tokens of the tokenizer at hand.
            drawn: see above.

        Raises:
            OwnerError: it does not answer as llama.cpp's server does, or applies a LoRA adapter.
        """
        has = engine.properties()
        about = About("llama.cpp", model, has.vocabulary_size, has.d, has.context, has.parameters, has.bytes)
        return cls(engine, about, has.vocabulary_size or tokens, drawn)

    @property
    def where(self) -> str:
        """Its address."""
        return self.engine.connection.url

    def tokens(self, text: str) -> list[int]:
        """See `api.LogProbAPI.tokens`."""
        return self.engine.tokens(text)

    def chat(self, messages: Sequence[dict[str, str]]) -> str:
        """See `api.LogProbAPI.chat`."""
        return self.engine.chat(messages)

    def likeliest(self, contexts: Sequence[Sequence[int]], count: int, *, cached: bool) -> TopK:
        """See `api.LogProbAPI.likeliest`."""
        rows = [self.engine.likeliest(context, count, self.drawn, cached=cached) for context in contexts]
        return TopK(torch.tensor([tokens for tokens, _ in rows]), torch.stack([values for _, values in rows]))

    def chosen(self, contexts: Sequence[Sequence[int]], tokens: Sequence[int], *, cached: bool) -> Tensor:
        """See `api.LogProbAPI.chosen`."""
        # The contexts of a request are in the engine's memory at the same time.
        divided = parts(contexts, self.about.context or 1)
        return torch.cat([self.engine.chosen(part, tokens, cached=cached) for part in divided])
