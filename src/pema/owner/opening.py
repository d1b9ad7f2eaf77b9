"""Opening of PLMs by name: in this process, or on their owner's server."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from pema.errors import ConfigError
from pema.owner.client.remote import RemotePLM
from pema.owner.config import LoadConfig
from pema.owner.contract import PLM
from pema.owner.engines.opening import open_engine
from pema.owner.llamacpp.plm import LlamaCppPLM
from pema.owner.local import LocalPLM
from pema.owner.logprobs.plm import LogProbPLM
from pema.owner.mask import Mask, MaskedPLM
from pema.owner.openai_api.config import APIConfig, is_described
from pema.owner.openai_api.plm import ProxyPLM
from pema.owner.sources.names import LOGPROBS, SGLANG, VLLM
from pema.owner.sources.served import is_served, served
from pema.schema import known

if TYPE_CHECKING:
    from pema.owner.wire import WireDtype


def open_plm(name: str | Path, **settings: Any) -> PLM:  # noqa: ANN401
    """Open a PLM by name: a packaged one, a local folder, a GGUF file, a hub name, or what its owner runs or sells.

    Args:
        name: name of the PLM, `llamacpp:FILE` for one that llama.cpp runs, or the address of a server: of `pema serve`,
            of llama.cpp (`llamacpp+http://host:port#FILE`), of vLLM or SGLang with vectors
            (`vllm+http://host:port?completions=http://host:port#FOLDER`, `sglang+http://host:port#FOLDER`), or of an
            API that returns log-probabilities (`logprobs+http://host:port#FOLDER`), or a TOML file that describes an
            API (`APIConfig`).
        settings: fields of `LoadConfig`; for a `pema serve` only `tap` and `dtype`, the precision on the network
            (default float16); for engines and for log-probabilities only `mask_secret`; for an API those of its
            proxy.

    Raises:
        OwnerError: it cannot be loaded or reached, its head is not supported, or the secret cannot be read.
        ConfigError: the tap cannot be masked, or a setting can only be chosen by the PLM's owner.
    """
    known(LoadConfig, settings)
    config = LoadConfig(**settings)
    if str(name).startswith(("http://", "https://")):
        for option in ("mask_secret", "device_map", "revision"):
            value = getattr(config, option)
            if value is not None:
                raise ConfigError(f"{option}={value} is chosen by the PLM's owner: omit it for a server's address.")
        return RemotePLM(str(name), tap=config.tap, dtype=cast("WireDtype", config.dtype or "float16"))
    if is_described(str(name)):
        described = APIConfig.read(Path(name))
        return ProxyPLM(described, open_plm(described.proxy, **settings))
    mask = None if config.mask_secret is None else Mask.read(config.mask_secret)
    plm: PLM
    if is_served(str(name)):
        _require_own_settings(config)
        plm = _open_served(str(name))
    else:
        plm = LocalPLM.load(
            name, tap=config.tap, dtype=config.dtype, device_map=config.device_map, revision=config.revision
        )
    return plm if mask is None else MaskedPLM(plm, mask)


def accepted(name: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return those of the settings for loading a PLM in this process that a PLM of this name takes too.

    Raises:
        ConfigError, OwnerError: the file that describes an API cannot be read.
    """
    if is_described(name):
        return accepted(APIConfig.read(Path(name)).proxy, settings)
    if is_served(name):
        return {}
    if name.startswith(("http://", "https://")):
        return {key: value for key, value in settings.items() if key in ("tap", "dtype")}
    return dict(settings)


def _open_served(name: str) -> PLM:
    if name.startswith(LOGPROBS):
        return LogProbPLM.connect(served(name))
    return open_engine(name) if name.startswith((VLLM, SGLANG)) else LlamaCppPLM(served(name))


def _require_own_settings(config: LoadConfig) -> None:
    """Refuse settings that another engine chooses itself."""
    for name in ("dtype", "device_map", "revision"):
        value = getattr(config, name)
        if value is not None:
            raise ConfigError(f"{name}={value} is chosen by the engine that runs the PLM: omit it.")
    if config.tap != "head_input":
        raise ConfigError(f"tap={config.tap} is not possible with an engine, which returns what the LM head reads.")
