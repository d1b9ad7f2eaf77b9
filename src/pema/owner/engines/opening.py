"""Opening of PLMs on a running server of vLLM or SGLang, by the address."""

from __future__ import annotations

from collections.abc import Callable
from urllib.parse import parse_qsl

from pema.errors import ConfigError
from pema.owner.client.connection import Connection
from pema.owner.engines.at_hand import material_of
from pema.owner.engines.plm import EnginePLM
from pema.owner.engines.sglang import SglangPLM, SglangServer
from pema.owner.engines.vllm import PoolingServer, VllmPLM
from pema.owner.logprobs.api import About
from pema.owner.logprobs.completions import CompletionsAPI
from pema.owner.logprobs.opening import model_entry
from pema.owner.sources.names import VLLM
from pema.owner.sources.served import SCHEMES, served
from pema.schema import among


def open_engine(name: str, connect: Callable[[str], Connection] = Connection) -> EnginePLM:
    """Open `vllm+http://host:port#HEAD` or `sglang+http://host:port#HEAD`.

    The address may have the queries `model=NAME`, for a server with several models, and for vLLM
    `completions=http://host:port`, the server that completes.

    Args:
        name: the name of the PLM.
        connect: returns the connection to an address.

    Raises:
        ConfigError: the name has another form.
        OwnerError: a server cannot be reached, or does not give what is needed.
        MismatchError: a server runs another model than the one behind #.
    """
    source, is_vllm = served(name), name.startswith(VLLM)
    address, _, query = (source.url or "").partition("?")
    given = dict(parse_qsl(query, keep_blank_values=True))
    among("query", given, ["completions", "model"] if is_vllm else ["model"], f"the address {address}")
    model, completions = given.get("model", ""), given.get("completions")
    if completions is not None and not completions.startswith(SCHEMES):
        raise ConfigError(f"completions={completions} is not the address of a server: give http://host:port.")
    engine: type[VllmPLM | SglangPLM] = VllmPLM if is_vllm else SglangPLM
    # The servers come first: reading a model takes minutes, and finding that none answers does not.
    connection = connect(address)
    about = _about(engine.engine, connection, model)
    other = None if completions is None else connect(completions)
    entry = None if other is None else model_entry(other, model)
    at_hand = material_of(source, engine.engine)
    if not is_vllm:
        return SglangPLM(at_hand, SglangServer(connection, about))
    pooling = PoolingServer(connection, about)
    if other is None or entry is None:
        return VllmPLM(at_hand, pooling, None)
    begin = [*at_hand.tokenizer("").input_ids, *at_hand.ordinary_tokens(1)]
    return VllmPLM(at_hand, pooling, CompletionsAPI.of(other, entry, begin, len(at_hand.tokenizer)))


def _about(engine: str, connection: Connection, model: str) -> About:
    entry = model_entry(connection, model)
    context = entry.get("max_model_len")
    return About(engine, str(entry["id"]), None, None, context if type(context) is int else None)
