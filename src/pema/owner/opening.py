"""Opening a PLM by its name: in this process, or behind its owner's server."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, TypedDict, Unpack, cast

from pema.errors import ConfigError
from pema.owner.client.remote import RemotePLM
from pema.owner.contract import PLM, Tap
from pema.owner.loading import DeviceMap
from pema.owner.local import LocalPLM
from pema.owner.mask import Mask, MaskedPLM

if TYPE_CHECKING:
    import torch

    from pema.owner.wire import WireDtype


class Loading(TypedDict, total=False):
    """The settings of `LocalPLM.load`."""

    tap: Tap
    dtype: str | torch.dtype | None
    device_map: DeviceMap
    revision: str | None


def open_plm(name: str | Path, *, mask_secret: Path | None = None, **settings: Unpack[Loading]) -> PLM:
    """The PLM of that name: "embedded", a local folder, a hub name, or the address of a `pema serve`.

    Args:
        name: which PLM.
        mask_secret: file with the secret of its masked head (see `pema.owner.mask`); None for the plain one.
        settings: those of `LocalPLM.load`; for a server, `tap` and `dtype`, which is then the precision that crosses
            (float16 unless it is given).

    Raises:
        OwnerError: it cannot be loaded or reached, its head is not understood, or the secret cannot be read.
        ConfigError: a tap that cannot be masked, or settings that only the PLM's owner can choose.
    """
    if str(name).startswith(("http://", "https://")):
        theirs = {"mask_secret": mask_secret, "device_map": settings.get("device_map")}
        for option, value in (theirs | {"revision": settings.get("revision")}).items():
            if value is not None:
                raise ConfigError(
                    f"{option}={value} is the PLM owner's to choose: leave it out with a server's address."
                )
        dtype = settings.get("dtype") or "float16"
        return RemotePLM(str(name), tap=settings.get("tap", "head_input"), dtype=cast("WireDtype", dtype))
    if mask_secret is None:
        return LocalPLM.load(name, **settings)
    mask = Mask.read(mask_secret)
    return MaskedPLM(LocalPLM.load(name, **settings), mask)
