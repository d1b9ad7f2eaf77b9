"""`pema release`: what a PLM owner gives away, the head bundle."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pema.cli.options import AsJSON, DeviceMap, PLMDtype, TapName, show


def release(
    plm: Annotated[str, typer.Argument(help="Hub name or local folder of the PLM.", metavar="PLM")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder for the head bundle.", metavar="HEAD")],
    tap: Annotated[TapName, typer.Option("--tap", help="Where representations are read.")] = TapName.head_input,
    plm_dtype: PLMDtype = None,
    device_map: DeviceMap = None,
    as_json: AsJSON = False,
) -> None:
    """Write the head bundle of a PLM: W_hd, its bias, scaling and cap, and the final norm where the tap needs it.

    Where the PLM ties its embeddings, W_hd is the input embedding table too.

    Example: pema release embedded -o head
    """
    from pema.owner.local import open_plm

    owner = open_plm(plm, tap=tap.value, dtype=plm_dtype, device_map=device_map)
    head = owner.head()
    head.save(output)
    show(
        {
            "head": str(output),
            "plm": owner.description.name,
            "head_fingerprint": owner.description.head_fingerprint,
            "vocabulary_size": head.vocabulary_size,
            "width": head.d,
        },
        as_json,
    )
