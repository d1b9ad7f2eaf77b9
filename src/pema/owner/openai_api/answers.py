"""What an API answers: the tokens of a text with their likeliest alternatives, as its own texts and bytes."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pema.errors import OwnerError
from pema.schema import short

ESCAPED = re.compile(r"bytes:((?:\\x[0-9a-fA-F]{2})+)")
"""Form in which the endpoint `completions` of OpenAI writes a token that is no text."""

INCOMPLETE = "\ufffd"
"""The character that stands for a part of another one."""


@dataclass(frozen=True)
class Named:
    """A token as an API names it.

    Attributes:
        name: its text, or the name of a control token.
        content: its bytes; empty if the API says that it has none, or does not say.
        id: its number, if the API gives it.
    """

    name: str
    content: bytes
    id: int | None = None


@dataclass(frozen=True)
class Position:
    """A token of an answer.

    Attributes:
        token: the token.
        top: the likeliest tokens with their log-probabilities, the likeliest first.
    """

    token: Named
    top: tuple[tuple[Named, float], ...]


@dataclass(frozen=True)
class Answer:
    """An answer to a request.

    Attributes:
        positions: its tokens.
        ended: whether the model ended the text.
        prompt_tokens: number of tokens of the prompt, as the API counts them; None if it does not say.
        completion_tokens: number of tokens of the answer, as the API counts them.
    """

    positions: tuple[Position, ...]
    ended: bool
    prompt_tokens: int | None
    completion_tokens: int


def parse(body: Mapping[str, Any], least: int, where: str) -> Answer:
    """Read the body of an answer, untrusted input.

    Args:
        body: the JSON object.
        least: number of log-probabilities that each token must have.
        where: name of the API, for messages.

    Raises:
        OwnerError: it is no answer, has no log-probabilities, or fewer than `least`.
    """
    try:
        choice = body["choices"][0]
        given, reason = choice.get("logprobs"), choice.get("finish_reason")
        positions = _positions(given) if given else None
        text = str(choice.get("text") or (choice.get("message") or {}).get("content") or "")
        usage = body.get("usage") or {}
        prompt_tokens, completion_tokens = usage.get("prompt_tokens"), usage.get("completion_tokens")
        counts = [n for n in (prompt_tokens, completion_tokens) if n is not None]
        if not all(isinstance(n, int) and n >= 0 for n in counts):
            raise TypeError("usage is no count")
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        raise OwnerError(f"{where} answered with something that is no completion: {short(str(error))}.") from error
    if positions is None and text.strip(INCOMPLETE):  # llama.cpp gives none of parts of characters
        raise OwnerError(
            f"{where} gives no log-probabilities of its tokens, and the mixture needs them: use an API that gives the "
            "top 20 (OpenAI's, Gemini's, Ollama's; Anthropic's gives none)."
        )
    positions = positions or ()
    few = next((len(each.top) for each in positions if len(each.top) < least), None)
    if few is not None:
        raise OwnerError(
            f"{where} gives {few} log-probabilities of a token, and top_logprobs={least} were requested: set "
            f"top_logprobs to what it gives, at least 5."
        )
    return Answer(positions, reason == "stop", prompt_tokens, completion_tokens or len(positions))


def _positions(given: Mapping[str, Any]) -> tuple[Position, ...] | None:
    """Return the tokens of an answer: `content` in a chat, and in llama.cpp; four lists in other completions."""
    if given.get("content") is not None:
        return tuple(Position(_named(each), _ranked(map(_pair, each["top_logprobs"]))) for each in given["content"])
    if given.get("tokens") is None:
        return None
    tops = given.get("top_logprobs") or [{}] * len(given["tokens"])
    return tuple(
        Position(_named({"token": token}), _ranked((_named({"token": name}), float(p)) for name, p in top.items()))
        for token, top in zip(given["tokens"], tops, strict=True)
    )


def _pair(each: Mapping[str, Any]) -> tuple[Named, float]:
    return _named(each), float(each["logprob"])


def _ranked(pairs: Any) -> tuple[tuple[Named, float], ...]:  # noqa: ANN401
    """Sort tokens by their log-probabilities; tokens of no probability are none of the likeliest."""
    listed = [(token, log_p) for token, log_p in pairs if log_p != -math.inf]
    if any(math.isnan(log_p) or log_p > 0.01 for _, log_p in listed):
        raise ValueError("a log-probability is above 0, or no number")
    return tuple(sorted(listed, key=lambda pair: -pair[1]))


def _named(each: Mapping[str, Any]) -> Named:
    name, content, number = each["token"], each.get("bytes"), each.get("id")
    if not isinstance(name, str) or not (number is None or isinstance(number, int)):
        raise TypeError(f"{short(each)} is no token")
    escaped = ESCAPED.fullmatch(name)
    if content:
        return Named(name, bytes(content), number)
    if escaped:
        return Named(name, bytes.fromhex(escaped[1].replace("\\x", "")), number)
    return Named(name, name.encode("utf-8", "surrogatepass") if content is None else b"", number)
