"""`pema release`: the head bundle, which the PLM owner gives to data owners."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from pema.cli.options import AsJSON, LocalPLMName, loading, local_path, require_plm, show
from pema.cli.settings import declared
from pema.console import note
from pema.errors import ConfigError
from pema.schema import among
from pema.storage.address import is_address, shown

MASKS = ("none", "rotation")
"""Masks of a head bundle."""


@declared(loaded=loading("tap", "dtype", "device_map", "revision"))
def release(
    plm: LocalPLMName,
    output: Annotated[
        str, typer.Option("-o", "--output", help="Folder for the head bundle, or its address.", metavar="HEAD")
    ],
    loaded: dict[str, Any],
    mask: Annotated[
        str,
        typer.Option(
            "--mask",
            help="rotation: W_hd Q^T with a secret orthogonal Q (docs/masked-head.md).",
            metavar="|".join(MASKS),
        ),
    ] = "none",
    secret: Annotated[
        Path | None,
        typer.Option("--secret", callback=local_path, help="File of the mask's secret; created if it does not exist."),
    ] = None,
    as_json: AsJSON = False,
) -> None:
    """Write the head bundle of a PLM: W_hd, its bias, scaling and cap, and the final norm where the tap needs it.

    Where the PLM ties its embeddings, W_hd is the input embedding table too: --mask rotation gives away that table in
    coordinates which only the owner of the secret knows. Build and generate with the same secret (--mask-secret).

    Example: pema release embedded -o head --mask rotation --secret secret.key
    """
    among("--mask", [mask], MASKS)
    if (mask == "rotation") != (secret is not None):
        raise ConfigError(
            "--mask rotation needs --secret FILE, where the secret is kept."
            if secret is None
            else "--secret is for a masked head: give --mask rotation too."
        )
    if secret is not None and not is_address(output) and secret.resolve().is_relative_to(Path(output).resolve()):
        raise ConfigError(f"the secret {secret} would be in {output}, which is given away: keep it elsewhere.")
    require_plm(plm, loaded.get("revision"))

    from pema.owner.mask import Mask
    from pema.owner.opening import open_plm
    from pema.owner.places import HEAD_BUNDLE
    from pema.storage.publishing import destination

    with destination(output, HEAD_BUNDLE, anew=True) as folder:
        if secret is not None and Mask.create(secret):
            note(f"{secret} contains a new secret. Keep it, and do not give it away: no adapter works without it.")
        owner = open_plm(plm, mask_secret=secret, **loaded)
        head = owner.head()
        head.save(folder)
    show(
        {
            "head": shown(output),
            "plm": owner.description.name,
            "head_fingerprint": owner.description.head_fingerprint,
            "vocabulary_size": head.vocabulary_size,
            "width": head.d,
            "mask": mask,
        },
        as_json,
    )
