"""Opening a PLM by its name: in this process, or behind its owner's server."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from pema.errors import ConfigError
from pema.owner.client.remote import RemotePLM
from pema.owner.config import LoadConfig
from pema.owner.contract import PLM
from pema.owner.local import LocalPLM
from pema.owner.mask import Mask, MaskedPLM
from pema.schema import known

if TYPE_CHECKING:
    from pema.owner.wire import WireDtype


def open_plm(name: str | Path, **settings: Any) -> PLM:  # noqa: ANN401
    """Open the PLM of that name: "embedded", a local folder, a hub name, or the address of a `pema serve`.

    Args:
        name: which PLM.
        settings: fields of `LoadConfig`. For a server `tap` and `dtype`, which is then the precision that crosses
            (float16 unless it is given).

    Raises:
        OwnerError: it cannot be loaded or reached, its head is not understood, or the secret cannot be read.
        ConfigError: a tap that cannot be masked, or settings that only the PLM's owner can choose.
    """
    known(LoadConfig, settings)
    config = LoadConfig(**settings)
    if str(name).startswith(("http://", "https://")):
        for option in ("mask_secret", "device_map", "revision"):
            value = getattr(config, option)
            if value is not None:
                raise ConfigError(
                    f"{option}={value} is the PLM owner's to choose: leave it out with a server's address."
                )
        return RemotePLM(str(name), tap=config.tap, dtype=cast("WireDtype", config.dtype or "float16"))
    mask = None if config.mask_secret is None else Mask.read(config.mask_secret)
    plm = LocalPLM.load(
        name, tap=config.tap, dtype=config.dtype, device_map=config.device_map, revision=config.revision
    )
    return plm if mask is None else MaskedPLM(plm, mask)
