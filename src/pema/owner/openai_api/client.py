"""The client of an OpenAI-compatible API: requests through the openai library, answers from the ledger."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from pema.cache import cache_folder
from pema.errors import OwnerError
from pema.extras import require_library
from pema.files import digest
from pema.owner.client.connection import require_private
from pema.owner.openai_api.answers import Answer, parse
from pema.owner.openai_api.config import APIConfig
from pema.owner.openai_api.ledger import Ledger, Spending
from pema.schema import short

if TYPE_CHECKING:
    from pathlib import Path

    from pema.tasks.example import Turn

RETRIES = 8
"""Number of times that a request is repeated: with growing pauses, or after the pause that `Retry-After` asks for."""

TIMEOUT = 120.0
"""Seconds that an answer may take."""

FRAMING = 64
"""Tokens of a turn that a request is charged for until it is answered, beside its text."""


class Client:
    """The client of one API.

    A request that was answered before, in this process or another one, is answered from the file of the ledger.

    Attributes:
        config: the description of the API.
        where: name of the API, for messages.
    """

    def __init__(self, config: APIConfig) -> None:
        """Open the ledger; the API is reached at the first request.

        Raises:
            ConfigError: the openai library is not installed, or the address would send prompts unencrypted.
            StorageError: the file of the answers cannot be used.
        """
        require_library(f"the API at {config.base_url}", "openai", "openai")
        require_private(config.base_url)
        self.config, self.where = config, f"{config.model} at {config.base_url}"
        self._ledger = Ledger(config.cache or default_cache(config), config)
        self._api: Any = None

    @property
    def spending(self) -> Spending:
        """What was spent in total, in all processes."""
        return self._ledger.spending()

    @property
    def repeated(self) -> int:
        """Number of requests of this process that were answered from the file."""
        return self._ledger.repeated

    def ask(self, prompt: str | Sequence[Turn], written: str, count: int, prompt_tokens: int) -> Answer:
        """Request the likeliest continuation of a text, with the likeliest tokens of each position.

        Args:
            prompt: the plain prompt, or the turns of a chat.
            written: the beginning of the answer.
            count: maximum number of tokens.
            prompt_tokens: number of tokens of prompt and beginning.

        Raises:
            OwnerError: the API cannot be reached, refuses, gives no log-probabilities, or the budget does not allow it.
            ConfigError: the environment variable with the key is not set.
        """
        request = self._request(prompt, written, count)
        key = digest({"base_url": self.config.base_url, "endpoint": self.config.endpoint, "request": request})
        body = self._ledger.answer(key)
        if body is None:
            return self._send(request, key, count, prompt_tokens)
        return parse(body, self.config.top_logprobs, self.where)

    def close(self) -> None:
        """Close the file and the connections."""
        self._ledger.close()
        if self._api is not None:
            self._api.close()

    def _request(self, prompt: str | Sequence[Turn], written: str, count: int) -> dict[str, Any]:
        config = self.config
        common: dict[str, Any] = {"model": config.model, "max_tokens": count, "temperature": 0}
        if isinstance(prompt, str):
            return common | {"prompt": prompt + written, "logprobs": config.top_logprobs}
        messages = [{"role": turn.role, "content": turn.content} for turn in prompt]
        common |= {"logprobs": True, "top_logprobs": config.top_logprobs}
        if not written:
            return common | {"messages": messages}
        messages.append({"role": "assistant", "content": written})
        return common | {"messages": messages, "extra_body": dict(config.continuing)}

    def _send(self, request: dict[str, Any], key: str, count: int, prompt_tokens: int) -> Answer:
        import openai

        config = self.config
        if self._api is None:
            self._api = openai.OpenAI(
                base_url=config.base_url, api_key=config.api_key, max_retries=RETRIES, timeout=TIMEOUT
            )
        turns = len(request.get("messages", ()))
        number = self._ledger.begin(prompt_tokens + max(turns, 1) * FRAMING, count)
        resource = self._api.chat.completions if config.endpoint == "chat" else self._api.completions
        try:
            body = resource.create(**request).model_dump(mode="json", warnings=False)
        except openai.APITimeoutError as error:  # it may have been computed, so it stays counted
            raise OwnerError(
                f"{self.where} did not answer within {TIMEOUT:.0f} s, {RETRIES + 1} times: run the same command again "
                "later; all answers so far are kept."
            ) from error
        except openai.OpenAIError as error:
            self._ledger.cancel(number)
            raise self._refused(error) from error
        usage = body.get("usage") or {} if isinstance(body, dict) else {}
        given = [usage.get(name) for name in ("prompt_tokens", "completion_tokens")]
        most = (prompt_tokens, count)
        taken, made = (n if isinstance(n, int) and n >= 0 else m for n, m in zip(given, most, strict=True))
        try:
            answer = parse(body, config.top_logprobs, self.where)
        except OwnerError:  # it is counted, and not kept
            self._ledger.end(number, taken, made, None, None)
            raise
        self._ledger.end(number, taken, made, key, body)
        return answer

    def _refused(self, error: Exception) -> OwnerError:
        status = getattr(error, "status_code", None)
        reason = short(str(error)[:400])
        if status is None:
            return OwnerError(f"{self.where} cannot be reached: {reason}. Check base_url and the network.")
        remedy = "all answers so far are kept: run the same command again later."
        if status in (401, 403):
            remedy = f"check the key in {self.config.key}."
        elif status in (400, 404, 422):
            remedy = "check model, endpoint and top_logprobs in the description of the API."
        elif status == 429 and (pause := error.response.headers.get("retry-after")):  # type: ignore[attr-defined]
            remedy = f"it asks for a pause of {short(pause)[1:-1]} s. {remedy[0].upper()}{remedy[1:]}"
        return OwnerError(f"{self.where} refused a request with {status} ({reason}): {remedy}")


def default_cache(config: APIConfig) -> Path:
    """Return the file of the answers of an API in the folder of caches."""
    name = digest({"base_url": config.base_url, "model": config.model})
    return cache_folder() / "api" / f"{name[:32]}.sqlite"
