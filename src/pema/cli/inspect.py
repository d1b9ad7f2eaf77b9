"""`pema inspect`: which distribution decided each generated token, as one HTML page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pema.cli.options import (
    AsJSON,
    DeviceMap,
    LambdaMax,
    MaskSecret,
    OwnTaskName,
    PLMDtype,
    PLMName,
    ScheduleOption,
    TemplateText,
    show,
)


def inspect(
    adapter: Annotated[Path, typer.Argument(help="Folder or hub name of the adapter.", metavar="ADAPTER")],
    plm: PLMName,
    text: Annotated[str, typer.Option("--text", help="The source text.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Where the page goes, e.g. page.html.")],
    reference: Annotated[
        str | None, typer.Option("--reference", help="A reference to show beside the generated text.")
    ] = None,
    schedule: ScheduleOption = None,
    lambda_max: LambdaMax = None,
    max_new_tokens: Annotated[int | None, typer.Option("--max-new-tokens", min=1, help="Longest output.")] = None,
    task: OwnTaskName = None,
    template: TemplateText = None,
    plm_dtype: PLMDtype = None,
    device_map: DeviceMap = None,
    mask_secret: MaskSecret = None,
    as_json: AsJSON = False,
) -> None:
    """Generate one text greedily and show who decided each token, on a page that needs no network.

    Example: pema inspect adapter --plm embedded --text "Where is your order?" -o page.html
    """
    from pema.adapter.module import Adapter
    from pema.adapter.task import task_of
    from pema.owner.opening import open_plm
    from pema.pages.inspector.page import write_inspection

    loaded = Adapter.from_pretrained(adapter)
    chosen = task_of(loaded.config, task, template)
    name = None if schedule is None else schedule.value
    mixture = loaded.config.choose_schedule(name, lambda_max)
    tap = loaded.config.plm.tap if loaded.config.plm is not None else "head_input"
    owner = open_plm(plm, mask_secret=mask_secret, tap=tap, dtype=plm_dtype, device_map=device_map)
    found = write_inspection(
        output, owner, loaded, text, chosen, mixture, reference=reference, max_new_tokens=max_new_tokens
    )
    show({"output": str(output), "text": found.output, "tokens": len(found.steps)}, as_json)
