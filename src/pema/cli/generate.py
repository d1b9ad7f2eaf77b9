"""`pema generate`: step 4, text from the PLM and the adapter together."""

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


def generate(
    adapter: Annotated[Path, typer.Argument(help="Folder or hub name of the adapter.", metavar="ADAPTER")],
    plm: PLMName,
    inputs: Annotated[Path, typer.Option("--input", help="Source texts, one a line.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Where the texts go, one a line, in the same order.")],
    schedule: ScheduleOption = None,
    lambda_max: LambdaMax = None,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Sequences at a time.")] = 32,
    num_beams: Annotated[int, typer.Option("--num-beams", min=1, help="1 is greedy.")] = 1,
    max_new_tokens: Annotated[int | None, typer.Option("--max-new-tokens", min=1, help="Longest output.")] = None,
    no_adapter: Annotated[bool, typer.Option("--no-adapter", help="The PLM alone, for comparison.")] = False,
    task: OwnTaskName = None,
    template: TemplateText = None,
    plm_dtype: PLMDtype = None,
    device_map: DeviceMap = None,
    mask_secret: MaskSecret = None,
    as_json: AsJSON = False,
) -> None:
    """Generate with the PLM and the adapter: P = lambda_t P_PEMA + (1 - lambda_t) P_LM.

    Example: pema generate adapter --plm embedded --input test.en -o test.de
    """
    from pema.adapter.module import Adapter
    from pema.adapter.schedule import NoAdapter, Schedule
    from pema.adapter.task import task_of
    from pema.evaluation.outputs import write_hypotheses
    from pema.generation.decoding import generate_counted
    from pema.owner.contract import Tap
    from pema.owner.opening import open_plm
    from pema.tasks.readers import read_lines
    from pema.tasks.registry import get_task

    sources = read_lines(inputs)
    loaded = None if no_adapter and task is not None else Adapter.from_pretrained(adapter)
    chosen = get_task(task or "", template) if loaded is None else task_of(loaded.config, task, template)
    mixture: Schedule = NoAdapter()
    tap: Tap = "head_input"
    if loaded is not None and not no_adapter:
        name = None if schedule is None else schedule.value
        mixture = loaded.config.choose_schedule(name, lambda_max)
        tap = loaded.config.plm.tap if loaded.config.plm is not None else tap
    owner = open_plm(plm, mask_secret=mask_secret, tap=tap, dtype=plm_dtype, device_map=device_map)
    found = generate_counted(
        owner,
        None if no_adapter else loaded,
        sources,
        chosen,
        mixture,
        batch_size=batch_size,
        num_beams=num_beams,
        max_new_tokens=max_new_tokens,
    )
    write_hypotheses(output, found.texts)
    show({"output": str(output), "lines": len(found.texts), "cut": found.cut}, as_json)
