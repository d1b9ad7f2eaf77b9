"""The interface to an API that returns log-probabilities of next tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol, runtime_checkable

from torch import Tensor


class About(NamedTuple):
    """What an API says of its model; None for what it does not say.

    Attributes:
        engine: what answers: `llama.cpp`, or `completions` for an OpenAI-compatible server such as vLLM.
        model: the name of the model there.
        vocabulary_size: number of tokens.
        d: width of a representation.
        context: maximum tokens of a context, with the token that follows.
        parameters: number of weights.
        bytes: size of the weights.
    """

    engine: str
    model: str
    vocabulary_size: int | None
    d: int | None
    context: int | None
    parameters: int | None = None
    bytes: int | None = None


class TopK(NamedTuple):
    """The likeliest next tokens of some contexts.

    Attributes:
        tokens: (n, k) int64, in order.
        values: (n, k) float64, their log-probabilities.
    """

    tokens: Tensor
    values: Tensor


class LogProbAPI(Protocol):
    """An API that returns log-probabilities of next tokens."""

    @property
    def where(self) -> str:
        """Its address, for messages."""

    @property
    def about(self) -> About:
        """What it says of its model."""

    @property
    def most(self) -> int:
        """Maximum number of log-probabilities of a position."""

    @property
    def entry_bytes(self) -> int:
        """Bytes of an answer for each of them, nearly."""

    def tokens(self, text: str) -> list[int] | None:
        """Return the tokens of a text as the API sees them, or None if it does not say."""

    def chat(self, messages: Sequence[dict[str, str]]) -> str | None:
        """Return messages in the model's chat template, or None if the API does not say."""

    def likeliest(self, contexts: Sequence[Sequence[int]], count: int, *, cached: bool) -> TopK:
        """Return the likeliest next tokens after each context.

        Args:
            contexts: the contexts.
            count: number of tokens, at most `most`.
            cached: whether a state that is kept of a context's beginning may be used.
        """

    def chosen(self, contexts: Sequence[Sequence[int]], tokens: Sequence[int], *, cached: bool) -> Tensor | None:
        """Return the log-probabilities of chosen next tokens after each context, (n, k) float64, up to a constant.

        Returns:
            None if the API returns the likeliest tokens only.
        """


@runtime_checkable
class ReadsSequences(Protocol):
    """An API that returns log-probabilities of all positions of a sequence in one request."""

    def along(self, tokens: Sequence[int], start: int, count: int) -> TopK:
        """Return the likeliest next tokens after tokens[:start], tokens[:start + 1], ..., tokens."""
