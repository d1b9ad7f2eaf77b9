# ruff: noqa: RUF009  (`option` is `dataclasses.field` with the meaning and limits beside the default)
"""The description of an API: a TOML file, or `APIConfig` in Python."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from pema.errors import ConfigError, OwnerError
from pema.owner.api_keys import api_key
from pema.schema import check, documented, from_json, option

Endpoint = Literal["chat", "completions"]

MILLION = 1_000_000
"""Number of tokens that a price is for."""

MOST_TOP = 20
"""Largest number of log-probabilities of a token that such an API gives."""

SUFFIX = ".toml"


@documented
@dataclass(frozen=True)
class APIConfig:
    """Description of an OpenAI-compatible API, its tokenizer, its proxy and what may be spent.

    Raises:
        ConfigError: a value is outside its limits, or values contradict each other.
    """

    called = "the description of an API"

    base_url: str = option(help="Address of the API, as the openai library takes it: https://.../v1.", line=True)
    model: str = option(help="Name of the model at the API.", line=True, longest=512)
    tokenizer: str = option(
        help="The model's tokenizer: a folder or hub name of transformers, a GGUF file, or tiktoken:NAME.", line=True
    )
    proxy: str = option("smollm2-135m", "The small open PLM whose representations are used.", line=True)
    endpoint: Endpoint = option("chat", "Which requests are sent: chat, or completions (plain prompts).")
    key: str = option("OPENAI_API_KEY", "Environment variable with the API key.", pattern=r"[A-Za-z_]\w*")
    top_logprobs: int = option(MOST_TOP, "Log-probabilities that are requested of each token.", least=5, most=MOST_TOP)
    block: int = option(8, "Tokens that are requested at once in generation.", least=1, most=256)
    parallel: int = option(4, "Requests that are sent at the same time.", least=1, most=256)
    max_requests: int | None = option(None, "Budget: requests in total; default: no limit.", least=0)
    max_cost: float | None = option(None, "Budget: money in total; needs both prices.", least=0.0, most=1e9)
    prompt_price: float | None = option(None, "Price of a million prompt tokens.", least=0.0, most=1e9)
    completion_price: float | None = option(None, "Price of a million generated tokens.", least=0.0, most=1e9)
    cache: Path | None = option(None, "File for answers and spending; default: one per API in $PEMA_CACHE.")
    continuing: Mapping[str, Any] = field(
        default_factory=dict,
        metadata={"help": "Further fields of chat requests that continue a reply, if the server needs them."},
    )

    def __post_init__(self) -> None:
        check(self)
        if self.max_cost is not None and (self.prompt_price is None or self.completion_price is None):
            raise ConfigError(
                f"max_cost={self.max_cost} needs prompt_price and completion_price, the prices of a million tokens."
            )

    @classmethod
    def read(cls, path: Path) -> APIConfig:
        """Read the description in a TOML file; paths in it are relative to the file.

        Raises:
            OwnerError: the file cannot be read.
            ConfigError: it is not TOML, or a value is missing, unknown or invalid.
        """
        try:
            with path.expanduser().open("rb") as file:
                values = tomllib.load(file)
        except OSError as error:
            raise OwnerError(f"{path} cannot be read: {error.strerror or error}.") from error
        except ValueError as error:  # TOML, or UTF-8
            raise ConfigError(f"{path} is not a TOML file: {error}.") from error
        config = from_json(cls, values, path.name)
        cache = None if config.cache is None else path.expanduser().parent / config.cache
        tokenizer, proxy = _beside(path, config.tokenizer), _beside(path, config.proxy)
        return replace(config, tokenizer=tokenizer, proxy=proxy, cache=cache)

    @property
    def api_key(self) -> str:
        """The API key.

        Raises:
            ConfigError: the environment variable is not set, or contains what no key does.
        """
        value = api_key(self.key)
        if not value:
            raise ConfigError(f"the environment variable {self.key} is not set: set it to the key of {self.base_url}.")
        return value

    def cost(self, prompt_tokens: int, completion_tokens: int) -> float | None:
        """Return the price of tokens; None without prices."""
        if self.prompt_price is None or self.completion_price is None:
            return None
        return (prompt_tokens * self.prompt_price + completion_tokens * self.completion_price) / MILLION


def is_described(name: str) -> bool:
    """Return whether the name of a PLM is that of a file which describes an API."""
    return name.lower().endswith(SUFFIX)


def _beside(path: Path, name: str) -> str:
    """Return a file or folder beside the description by its path; another name as it is."""
    place = path.expanduser().parent / name
    return str(place) if place.exists() else name
