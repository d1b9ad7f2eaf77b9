# ruff: noqa: RUF009  (`option` is `dataclasses.field` with the meaning and limits beside the default)
"""How a PLM is loaded (`LoadConfig`)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pema.owner.contract import Tap
from pema.schema import check, documented, option

PLMDtype = Literal["auto", "float32", "float16", "bfloat16", "float64"]
"""Precisions that a PLM can be loaded in; `auto` is the checkpoint's own."""


@documented
@dataclass(frozen=True)
class LoadConfig:
    """How a PLM is loaded.

    Raises:
        ConfigError: a value that is not among its choices.
    """

    tap: Tap = option(
        "head_input",
        "Where f(c) is read: what the LM head reads, or the input of the final norm, which inference servers give out.",
    )
    dtype: PLMDtype | None = option(
        None,
        "Precision to load the PLM in; auto: the checkpoint's own. By default auto, but float32 on a processor without "
        "fast half precision. With a server's address: the precision that crosses, float16 by default.",
    )
    device_map: Any = option(None, "Where the PLM goes, as in transformers: cpu, cuda, auto, ...; by default the CPU.")
    revision: str | None = option(None, "Branch, tag or commit on the hub.", line=True, longest=512)
    mask_secret: Path | None = option(
        None, "File with the PLM owner's secret: work with the masked head that `pema release` wrote."
    )

    def __post_init__(self) -> None:
        dtype: Any = self.dtype
        if dtype is not None and not isinstance(dtype, str) and str(dtype).startswith("torch."):
            object.__setattr__(self, "dtype", str(dtype).removeprefix("torch."))
        check(self)
