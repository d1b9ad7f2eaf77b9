"""Opening of an API that returns log-probabilities, by its address."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from pema.errors import OwnerError
from pema.owner.client.connection import Connection
from pema.owner.llamacpp.engine import Engine
from pema.owner.llamacpp.tokenisation import end_tokens, ordinary_tokens, require_same_tokens
from pema.owner.logprobs.api import LogProbAPI
from pema.owner.logprobs.completions import CompletionsAPI
from pema.owner.logprobs.llamacpp import LlamaCppAPI
from pema.owner.sources.conversion import LOCAL
from pema.owner.sources.names import resolve
from pema.schema import among, short


def open_api(url: str, tokenizer: PreTrainedTokenizerBase, connection: Connection | None = None) -> LogProbAPI:
    """Find out what answers at an address and what it runs.

    Args:
        url: the address, with `?model=NAME` if the server has several models.
        tokenizer: the model's tokenizer.
        connection: connection to it; default: one to the address.

    Raises:
        OwnerError: nothing that returns log-probabilities answers, or the model is not there.
        MismatchError: it has another tokenizer.
        ConfigError: the server has several models and none is named.
    """
    address, _, query = url.partition("?")
    connection = connection or Connection(address)
    model = model_entry(connection, parse_qs(query).get("model", [""])[0])
    ends = end_tokens(tokenizer, [])
    (drawn,) = ordinary_tokens(tokenizer, ends, len(tokenizer), 1)
    api: LogProbAPI
    if model.get("owned_by") == "llamacpp":
        api = LlamaCppAPI.of(Engine(connection), Path(str(model["id"])).name, len(tokenizer), drawn)
    else:
        api = CompletionsAPI.of(connection, model, [*tokenizer("").input_ids, drawn], len(tokenizer))
    require_same_tokens(api, tokenizer, api.where)
    return api


def read_tokenizer(name: str | Path) -> PreTrainedTokenizerBase:
    """Read a tokenizer from a folder with its files, a GGUF file, the name of a packaged PLM or a hub name.

    Raises:
        OwnerError: there is none.
    """
    path = Path(name).expanduser()
    try:
        return AutoTokenizer.from_pretrained(str(path if path.is_dir() else resolve(name).place), **LOCAL)
    except (OSError, ValueError, KeyError) as error:
        raise OwnerError(
            f"{name} contains no tokenizer: give a folder with the model's tokenizer.json and tokenizer_config.json, "
            "or its hub name."
        ) from error


def model_entry(connection: Connection, name: str) -> dict[str, Any]:
    """Return the entry of a model, or of the only one, in the server's list."""
    try:
        entries = json.loads(connection.request("GET", "/v1/models"))["data"]
        models: dict[str, dict[str, Any]] = {
            str(entry["id"]): dict(entry) for entry in entries if not entry.get("parent")
        }
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise OwnerError(
            f"{connection.url}/v1/models is not a list of models: check that llama.cpp's server or an "
            "OpenAI-compatible one runs there."
        ) from error
    if name:
        among("model", [name], models, connection.url)
        return models[name]
    if len(models) != 1:
        names = ", ".join(short(each) for each in list(models)[:8])
        raise OwnerError(f"{connection.url} has {len(models)} models ({names}): append ?model=NAME to the address.")
    return next(iter(models.values()))
