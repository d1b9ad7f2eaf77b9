# ruff: noqa: RUF009  (`option` is `dataclasses.field` with the meaning and limits beside the default)
"""The settings for loading a PLM (`LoadConfig`)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pema.owner.contract import Tap
from pema.schema import check, documented, option

PLMDtype = Literal["auto", "float32", "float16", "bfloat16", "float64"]
"""Precisions that a PLM can be loaded in; `auto` is that of the checkpoint."""


@documented
@dataclass(frozen=True)
class LoadConfig:
    """Settings for loading a PLM.

    Raises:
        ConfigError: a value is not among its choices.
    """

    tap: Tap = option(
        "head_input",
        "Where f(c) is read: at the input of the LM head, or of the final norm (as inference servers return it).",
    )
    dtype: PLMDtype | None = option(
        None,
        "Precision of the PLM; auto: that of the checkpoint. Default: auto, but float32 for half precision on a "
        "processor that is slow in it. With a server's address: precision on the network, default float16.",
    )
    device_map: Any = option(
        None, "Device placement of the PLM, as in transformers: cpu, cuda, auto, ...; default: the CPU."
    )
    revision: str | None = option(None, "Branch, tag or commit on the hub.", line=True, longest=512)
    mask_secret: Path | None = option(
        None, "File with the PLM owner's secret, to use the masked head that `pema release` wrote."
    )

    def __post_init__(self) -> None:
        dtype: Any = self.dtype
        if dtype is not None and not isinstance(dtype, str) and str(dtype).startswith("torch."):
            object.__setattr__(self, "dtype", str(dtype).removeprefix("torch."))
        check(self)
